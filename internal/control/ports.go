package control

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Ports are how the ports of capsules are reached. They are private unless their
// owner has made them public: one gets in with an API key of the capsule's team, or
// with a token that such a key was used to sign. envd's own port is closed to everybody.
type Ports struct {
	cfg      Config
	keys     *Keys
	capsules *Capsules

	secret atomic.Pointer[[]byte] // nil until it was read; it never changes
	public holds                  // requests that were let in by nothing but that
	ending atomic.Pointer[func(capsule string) (done func())]
}

// OnEnding has f be called before a process of a capsule is told to end, since
// connections to it would hold that up, and done when it has ended, or nobody waits for
// that any more. f returns soon.
func (p *Ports) OnEnding(f func(capsule string) (done func())) { p.ending.Store(&f) }

// end is called before a process of a capsule is told to end.
func (p *Ports) end(capsule string) (done func()) {
	if f := p.ending.Load(); f != nil {
		return (*f)(capsule)
	}
	return func() {}
}

// Bounds of a token's life.
const (
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 7 * 24 * time.Hour
)

// PortCredential is what somebody who wants to a port has shown: any one of all
// is enough.
type PortCredential struct {
	APIKeys []string
	Tokens  []string // of signed URLs; a browser may send cookies of others with ours
}

// Entry is that somebody may reach a port.
type Entry struct {
	TeamID   string // whose capsule it is
	KeyID    string // of the key that lets in, or signed; "" = the port is public
	Settings nestbox.PortSettings

	capsule string
	port    uint16
}

// name names what a public port lets through.
func (e Entry) name() string { return fmt.Sprintf("%s/%d", e.capsule, e.port) }

// maxShown is how many credentials of a request are looked at.
const maxShown = 8

// Signed lets everybody who has its Token into one port of one capsule, until it
// expires or the key that signed it is removed.
type Signed struct {
	Capsule string // id
	Token   string
	Expires time.Time // to the second
}

// Sign makes a token for a port. ttl ≤ 0 is one hour. CodeInvalid: port 0, or a ttl of
// more than 7 days. CodeDenied: envd's port.
func (p *Ports) Sign(ctx context.Context, by Caller, id string, port uint16, ttl time.Duration) (Signed, error) {
	if ttl <= 0 {
		ttl = defaultTokenTTL
	}
	if ttl > maxTokenTTL {
		return Signed{}, nestbox.Errorf(nestbox.CodeInvalid, "a port URL can be valid for at most %d hours", maxTokenTTL/time.Hour)
	}
	if err := checkPort(port); err != nil {
		return Signed{}, err
	}
	capsule, err := p.capsules.Get(ctx, by, id)
	if err != nil {
		return Signed{}, err
	}
	secret, err := p.signingSecret(ctx)
	if err != nil {
		return Signed{}, err
	}
	expires := p.cfg.Now().Add(ttl).UTC().Truncate(time.Second)
	if ttl < time.Second { // truncated it would have expired already
		expires = expires.Add(time.Second)
	}
	raw := binary.BigEndian.AppendUint64(nil, uint64(expires.Unix()))
	raw = append(raw, strings.TrimPrefix(by.KeyID, nestbox.PrefixKey)...)
	raw = append(raw, portMAC(secret, capsule.ID, port, by.KeyID, expires.Unix())...)
	return Signed{Capsule: capsule.ID, Token: base64.RawURLEncoding.EncodeToString(raw), Expires: expires}, nil
}

// Authorize decides whether a port may be reached, and says whose it is and how.
// CodeUnauthenticated: it is private, and there is no credential, or none that fits,
// has not expired and whose key is still there; there are settings all the same.
// CodeNotFound: no such capsule, or not the key's. CodeDenied: envd's port. The capsule is
// in use until ctx ends.
func (p *Ports) Authorize(ctx context.Context, id string, port uint16, cred PortCredential) (Entry, error) {
	if err := checkPort(port); err != nil {
		return Entry{}, err
	}
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return Entry{}, nestbox.Errorf(nestbox.CodeInvalid, "invalid capsule ID")
	}
	capsule, unknown := p.capsules.read(ctx, id)
	if unknown != nil && nestbox.CodeOf(unknown) != nestbox.CodeNotFound {
		return Entry{}, unknown
	}
	entry := Entry{TeamID: capsule.TeamID, Settings: capsule.Ports[port], capsule: id, port: port}
	if entry.Settings.Public {
		p.capsules.activity.during(ctx, capsule, p.cfg.Now)
		return entry, nil
	}
	by, err := p.identify(ctx, capsule, id, port, cred)
	if err != nil {
		return Entry{Settings: entry.Settings}, err
	}
	if unknown != nil { // a capsule that was forgotten, of which there is a token
		return Entry{}, unknown
	}
	entry.KeyID = by.KeyID
	p.capsules.activity.during(ctx, capsule, p.cfg.Now)
	return entry, nil
}

// identify returns the caller whose credential lets into a port.
func (p *Ports) identify(ctx context.Context, capsule nestbox.Capsule, id string, port uint16, cred PortCredential) (Caller, error) {
	var first error
	for _, key := range cred.APIKeys[:min(len(cred.APIKeys), maxShown)] {
		by, err := p.keys.Authenticate(ctx, key)
		if err == nil && by.TeamID != capsule.TeamID {
			err = nestbox.Errorf(nestbox.CodeNotFound, "capsule not found")
		}
		if err == nil {
			return by, nil
		}
		first = cmp.Or(first, err)
	}
	for _, token := range cred.Tokens[:min(len(cred.Tokens), maxShown)] {
		by, err := p.verify(ctx, id, port, token)
		if err == nil {
			return by, nil
		}
		first = cmp.Or(first, err)
	}
	if first == nil {
		first = nestbox.Errorf(nestbox.CodeUnauthenticated, "this port is private: send an API key in X-API-Key, or use a signed URL")
	}
	return Caller{}, first
}

// Hold returns a context that ends, as CodeUnauthenticated, when what the entry rests
// upon does: within a second of the removal of its key, or when the port is made
// private. Release it after use.
func (p *Ports) Hold(ctx context.Context, e Entry) (_ context.Context, release func()) {
	if e.KeyID == "" {
		ctx, release = p.public.hold(ctx, e.name())
		if capsule, err := p.capsules.read(ctx, e.capsule); err == nil && !capsule.Ports[e.port].Public {
			p.public.end(e.name(), errPortPrivate) // since Authorize
		}
		return ctx, release
	}
	return p.keys.Hold(ctx, Caller{TeamID: e.TeamID, KeyID: e.KeyID})
}

// keyIDBytes is the length of a key's id without its prefix.
const keyIDBytes = 25

// verify checks a token and returns whose key signed it. That it was signed says
// that its signer owned the capsule, and a capsule never changes hands.
func (p *Ports) verify(ctx context.Context, id string, port uint16, token string) (Caller, error) {
	bad := nestbox.Errorf(nestbox.CodeUnauthenticated, "the signed URL is not valid for this port, or has expired")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(raw) != 8+keyIDBytes+sha256.Size {
		return Caller{}, bad
	}
	secret, err := p.signingSecret(ctx)
	if err != nil {
		return Caller{}, err
	}
	expiry := int64(binary.BigEndian.Uint64(raw))
	keyID := nestbox.PrefixKey + string(raw[8:8+keyIDBytes])
	if !hmac.Equal(raw[8+keyIDBytes:], portMAC(secret, id, port, keyID, expiry)) || p.cfg.Now().Unix() >= expiry {
		return Caller{}, bad
	}
	key, err := p.cfg.Store.Key(ctx, keyID)
	if nestbox.CodeOf(err) == nestbox.CodeNotFound {
		return Caller{}, nestbox.Errorf(nestbox.CodeUnauthenticated, "the API key that signed this URL was removed")
	}
	return Caller{TeamID: key.TeamID, KeyID: keyID}, err
}

func portMAC(secret []byte, id string, port uint16, keyID string, expiry int64) []byte {
	mac := hmac.New(sha256.New, secret)
	_, _ = fmt.Fprintf(mac, "port-url\n%s\n%d\n%s\n%d", id, port, keyID, expiry) // a hash never fails
	return mac.Sum(nil)
}

// Dial connects to a port of a capsule, without asking who calls: Authorize first.
// CodeInvalidState: the capsule does not run. CodeUnavailable: nothing listens.
func (p *Ports) Dial(ctx context.Context, id string, port uint16) (net.Conn, error) {
	if err := checkPort(port); err != nil {
		return nil, err
	}
	capsule, err := p.capsules.read(ctx, id)
	if err != nil {
		return nil, err
	}
	g, err := p.capsules.enter(ctx, capsule)
	if err != nil {
		return nil, err
	}
	return g.Dial(ctx, port)
}

// Check returns why the ports of a capsule cannot be reached: CodeInvalidState, if it
// does not run. It is nil if that is not known.
func (p *Ports) Check(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, lookIn)
	defer cancel()
	capsule, err := p.capsules.read(ctx, id)
	if err == nil {
		_, err = p.capsules.enter(ctx, capsule)
	}
	if nestbox.CodeOf(err) != nestbox.CodeInvalidState {
		return nil
	}
	return err
}

func checkPort(port uint16) error {
	switch port {
	case 0:
		return nestbox.Errorf(nestbox.CodeInvalid, "port must be between 1 and 65535")
	case sandbox.EnvdPort:
		return nestbox.Errorf(nestbox.CodeDenied, "port %d is reserved", port)
	}
	return nil
}

// signingSecret returns the secret of this installation, for all that it signs, made at the first
// need. It is not capsule state: it never changes, so it is kept.
func (p *Ports) signingSecret(ctx context.Context) ([]byte, error) {
	if secret := p.secret.Load(); secret != nil {
		return *secret, nil
	}
	value, err := p.cfg.Store.Setting(ctx, "port-url-secret", nestbox.RandomHex(sha256.Size))
	if err != nil {
		return nil, err
	}
	secret, err := hex.DecodeString(value)
	if err != nil || len(secret) != sha256.Size {
		return nil, nestbox.Errorf(nestbox.CodeInternal, "the stored secret of port URLs is damaged")
	}
	p.secret.Store(&secret)
	return secret, nil
}
