package control

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Ports are how http://<port>-<capsule>.<domain>/ is reached. They are private:
// one gets in with an API key of the capsule's team, or with a token that such
// a key was used to sign. envd's own port is closed to everybody.
type Ports struct {
	cfg      Config
	keys     *Keys
	capsules *Capsules

	secret atomic.Pointer[[]byte] // nil until it was read; it never changes
}

// Bounds of a token's life.
const (
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 7 * 24 * time.Hour
)

// PortCredential is what somebody who wants to a port has shown: one of both is
// enough.
type PortCredential struct {
	APIKey string
	Token  string
}

// Sign returns a token that lets everybody who has it into one port of one
// capsule, until it expires. ttl ≤ 0 is one hour. CodeInvalid: port 0, or a ttl
// of more than 7 days. CodeDenied: envd's port.
func (p *Ports) Sign(ctx context.Context, by Caller, id string, port uint16, ttl time.Duration) (token string, expires time.Time, err error) {
	if ttl <= 0 {
		ttl = defaultTokenTTL
	}
	if ttl > maxTokenTTL {
		return "", time.Time{}, nestbox.Errorf(nestbox.CodeInvalid, "a port URL can be valid for at most %d hours", maxTokenTTL/time.Hour)
	}
	if err := checkPort(port); err != nil {
		return "", time.Time{}, err
	}
	if _, err := p.capsules.Get(ctx, by, id); err != nil {
		return "", time.Time{}, err
	}
	secret, err := p.signingSecret(ctx)
	if err != nil {
		return "", time.Time{}, err
	}
	expires = p.cfg.Now().Add(ttl).UTC().Truncate(time.Second)
	if ttl < time.Second { // truncated it would have expired already
		expires = expires.Add(time.Second)
	}
	raw := binary.BigEndian.AppendUint64(nil, uint64(expires.Unix()))
	raw = append(raw, portMAC(secret, id, port, expires.Unix())...)
	return base64.RawURLEncoding.EncodeToString(raw), expires, nil
}

// Authorize decides whether a port may be reached. CodeUnauthenticated: no
// credential, or one that does not fit or has expired. CodeNotFound: no such
// capsule, or not the key's. CodeDenied: envd's port.
func (p *Ports) Authorize(ctx context.Context, id string, port uint16, cred PortCredential) error {
	if err := checkPort(port); err != nil {
		return err
	}
	if !nestbox.ValidID(nestbox.PrefixCapsule, id) {
		return nestbox.Errorf(nestbox.CodeInvalid, "invalid sandbox ID")
	}
	if cred.APIKey != "" {
		by, err := p.keys.Authenticate(ctx, cred.APIKey)
		if err == nil {
			_, err = p.capsules.Get(ctx, by, id)
		}
		if err == nil || cred.Token == "" {
			return err
		}
	}
	if cred.Token == "" {
		return nestbox.Errorf(nestbox.CodeUnauthenticated, "this port is private: send an API key in X-API-Key, or use a signed URL")
	}
	return p.verify(ctx, id, port, cred.Token)
}

// verify checks a token. That it was signed says that its signer owned the
// capsule, and a capsule never changes hands.
func (p *Ports) verify(ctx context.Context, id string, port uint16, token string) error {
	bad := nestbox.Errorf(nestbox.CodeUnauthenticated, "the signed URL is not valid for this port, or has expired")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(raw) != 8+sha256.Size {
		return bad
	}
	secret, err := p.signingSecret(ctx)
	if err != nil {
		return err
	}
	expiry := int64(binary.BigEndian.Uint64(raw))
	if !hmac.Equal(raw[8:], portMAC(secret, id, port, expiry)) || p.cfg.Now().Unix() >= expiry {
		return bad
	}
	return nil
}

func portMAC(secret []byte, id string, port uint16, expiry int64) []byte {
	mac := hmac.New(sha256.New, secret)
	_, _ = fmt.Fprintf(mac, "port-url\n%s\n%d\n%d", id, port, expiry) // a hash never fails
	return mac.Sum(nil)
}

// Dial connects to a port of a capsule, whoever asks: Authorize first.
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

func checkPort(port uint16) error {
	switch port {
	case 0:
		return nestbox.Errorf(nestbox.CodeInvalid, "port must be between 1 and 65535")
	case sandbox.EnvdPort:
		return nestbox.Errorf(nestbox.CodeDenied, "port %d is reserved", port)
	}
	return nil
}

// signingSecret returns the secret of this installation, made at the first
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
