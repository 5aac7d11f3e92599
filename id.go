package nestbox

import (
	"crypto/rand"
	"encoding/hex"
	"math/big"
	"regexp"
	"strings"
)

// Identifiers are a prefix and 25 lower-case base36 characters that hold 128
// random bits (the form of Wrenn's API: its ids are UUIDv4 in base36).
const (
	PrefixCapsule = "cl-"
	PrefixTeam    = "team-"
	PrefixKey     = "key-"
	PrefixHost    = "host-"

	idChars = 25
)

var idPattern = regexp.MustCompile(`^[0-9a-z]{25}$`)

// NewID returns a new random identifier with the given prefix.
func NewID(prefix string) string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	s := new(big.Int).SetBytes(b[:]).Text(36)
	return prefix + strings.Repeat("0", idChars-len(s)) + s
}

// ValidID reports whether id has the prefix and the form that NewID makes.
func ValidID(prefix, id string) bool {
	rest, ok := strings.CutPrefix(id, prefix)
	return ok && idPattern.MatchString(rest)
}

// RandomHex returns n random bytes as 2n lower-case hex characters.
func RandomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return hex.EncodeToString(b)
}
