package nestbox

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"
)

// Team owns capsules and keys.
type Team struct {
	ID        string
	Name      string
	CreatedAt time.Time
}

// APIKey is a team's credential. The key itself is shown once, when it is
// made; what is stored is its hash.
type APIKey struct {
	ID        string
	TeamID    string
	Name      string
	Prefix    string // the first 10 characters, to recognise it by
	Hash      string
	CreatedAt time.Time
	LastUsed  time.Time // zero = never; kept to the minute
}

// KeyPrefix begins every API key; E2BKeyPrefix may stand in its place, since
// E2B's SDK refuses keys that do not begin with it.
const (
	KeyPrefix    = "wrn_"
	E2BKeyPrefix = "e2b_"
)

// NewAPIKey returns a new secret: KeyPrefix and 32 hex characters.
func NewAPIKey() string { return KeyPrefix + RandomHex(16) }

// HashAPIKey returns what is stored of a secret: the hex SHA-256 of it, in its
// KeyPrefix form.
func HashAPIKey(secret string) string {
	if rest, ok := strings.CutPrefix(secret, E2BKeyPrefix); ok {
		secret = KeyPrefix + rest
	}
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
