package control

import (
	"context"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nestbox/nestbox"
)

// Keys are teams and their API keys.
type Keys struct {
	cfg      Config
	activity *activity
	holds    holds
}

// Bounds and defaults of keys.
const (
	maxName        = 100 // bytes of a team's or a key's name
	maxSecret      = 256 // bytes of a secret that is looked at at all
	defaultKeyName = "Unnamed API Key"
)

// Authenticate returns whose key a secret is, in its wrn_ or its e2b_ form.
// CodeUnauthenticated: nobody's.
func (k *Keys) Authenticate(ctx context.Context, secret string) (Caller, error) {
	unknown := nestbox.Errorf(nestbox.CodeUnauthenticated, "invalid API key")
	if secret == "" || len(secret) > maxSecret {
		return Caller{}, unknown
	}
	key, err := k.cfg.Store.KeyByHash(ctx, nestbox.HashAPIKey(secret))
	if nestbox.CodeOf(err) == nestbox.CodeNotFound {
		return Caller{}, unknown
	}
	if err != nil {
		return Caller{}, err
	}
	k.activity.key(key, k.cfg.Now())
	return Caller{TeamID: key.TeamID, KeyID: key.ID}, nil
}

// CreateTeam makes a team.
func (k *Keys) CreateTeam(ctx context.Context, name string) (nestbox.Team, error) {
	name, err := cleanName("team", name)
	if err != nil {
		return nestbox.Team{}, err
	}
	team := k.newTeam(name)
	return team, k.cfg.Store.CreateTeam(ctx, team)
}

// Teams returns all teams, oldest first. It is for the operator: no route of
// the API leads here.
func (k *Keys) Teams(ctx context.Context) ([]nestbox.Team, error) { return k.cfg.Store.Teams(ctx) }

// Create makes a key for a team. The secret is returned here and never again.
// CodeNotFound: no such team.
func (k *Keys) Create(ctx context.Context, teamID, name string) (key nestbox.APIKey, secret string, err error) {
	if name == "" {
		name = defaultKeyName
	}
	if name, err = cleanName("key", name); err != nil {
		return key, "", err
	}
	key, secret = k.newKey(teamID, name)
	err = k.cfg.Store.CreateKey(ctx, key)
	if nestbox.CodeOf(err) == nestbox.CodeNotFound {
		err = nestbox.Errorf(nestbox.CodeNotFound, "team not found")
	}
	if err != nil {
		return nestbox.APIKey{}, "", err
	}
	return key, secret, nil
}

// List returns the keys of a team, oldest first.
func (k *Keys) List(ctx context.Context, teamID string) ([]nestbox.APIKey, error) {
	return k.cfg.Store.Keys(ctx, teamID)
}

// Delete removes a key: nobody gets in with it, or with a URL that it signed, and
// what it let through ends within a second. CodeNotFound:
// the team has no such key.
func (k *Keys) Delete(ctx context.Context, teamID, keyID string) error {
	if !nestbox.ValidID(nestbox.PrefixKey, keyID) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid key ID")
	}
	err := k.cfg.Store.DeleteKey(ctx, teamID, keyID)
	if nestbox.CodeOf(err) == nestbox.CodeNotFound {
		return nestbox.Errorf(nestbox.CodeNotFound, "API key not found")
	}
	if err == nil {
		k.holds.end(keyID, errKeyRemoved) // other servers find out by Watch
	}
	return err
}

// EnsureFirst makes the team "default" with the key "first" if there is no
// team at all, and returns the key's secret. Of several that try at the same
// time one makes them.
func (k *Keys) EnsureFirst(ctx context.Context) (secret string, created bool, err error) {
	team := k.newTeam("default")
	key, secret := k.newKey(team.ID, "first")
	created, err = k.cfg.Store.CreateFirstTeam(ctx, team, key)
	if !created {
		secret = ""
	}
	return secret, created, err
}

func (k *Keys) newTeam(name string) nestbox.Team {
	return nestbox.Team{ID: nestbox.NewID(nestbox.PrefixTeam), Name: name, CreatedAt: k.cfg.instant()}
}

func (k *Keys) newKey(teamID, name string) (key nestbox.APIKey, secret string) {
	secret = nestbox.NewAPIKey()
	return nestbox.APIKey{
		ID:        nestbox.NewID(nestbox.PrefixKey),
		TeamID:    teamID,
		Name:      name,
		Prefix:    secret[:10],
		Hash:      nestbox.HashAPIKey(secret),
		CreatedAt: k.cfg.instant(),
	}, secret
}

// cleanName trims a name that people read, and refuses one that they cannot.
func cleanName(what, name string) (string, error) {
	name = strings.TrimSpace(name)
	switch {
	case name == "":
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%s name is required", what)
	case len(name) > maxName:
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%s name is longer than %d bytes", what, maxName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%s name has control characters or is not UTF-8", what)
	}
	return name, nil
}
