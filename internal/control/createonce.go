package control

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/nestbox/nestbox"
)

// lookAgainAfter is how often a create is looked at that goes on elsewhere.
const lookAgainAfter = 100 * time.Millisecond

// CreateOnce is Create for a caller that may ask again: of all that ask with one key, at
// the same time or later, one makes a capsule and all get it, as long as it is remembered,
// in whatever state it is then. A create that failed leaves its key free. again is whether
// the capsule was there. CodeConflict: the key was used for another spec.
func (c *Capsules) CreateOnce(ctx context.Context, by Caller, key string, spec nestbox.CapsuleSpec) (_ nestbox.Capsule, again bool, err error) {
	if key == "" {
		capsule, err := c.Create(ctx, by, spec)
		return capsule, false, err
	}
	if err := nestbox.ValidateRequestKey(key); err != nil {
		return nestbox.Capsule{}, false, err
	}
	request := nestbox.CapsuleRequest{Key: key}
	if request.Sum, err = c.sumOf(ctx, spec); err != nil {
		return nestbox.Capsule{}, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, createIn)
	defer cancel()
	for {
		there, err := c.cfg.Store.CapsuleByRequest(ctx, by.TeamID, key)
		switch {
		case nestbox.CodeOf(err) == nestbox.CodeNotFound:
			capsule, err := c.create(ctx, by, spec, request)
			if nestbox.CodeOf(err) == nestbox.CodeConflict && c.asked(ctx, by, key) {
				continue // somebody was faster
			}
			return capsule, false, err
		case err != nil:
			return nestbox.Capsule{}, false, err
		case !hmac.Equal([]byte(there.Request.Sum), []byte(request.Sum)):
			return nestbox.Capsule{}, false, nestbox.Errorf(nestbox.CodeConflict, "the idempotency key was used for another capsule: %s", there.ID)
		case there.State == nestbox.StateError && there.StartedAt.IsZero():
			if err := c.cfg.Store.FreeRequestKey(ctx, there.ID); err != nil {
				return nestbox.Capsule{}, false, err
			}
			continue
		case there.State != nestbox.StateStarting:
			return c.activity.seen(there)[0], true, nil
		}
		select {
		case <-time.After(lookAgainAfter):
		case <-ctx.Done():
			return nestbox.Capsule{}, false, nestbox.Errorf(nestbox.CodeTimeout, "capsule %s, of the same idempotency key, is not up yet: %w", there.ID, ctx.Err())
		}
	}
}

// asked reports whether a capsule was asked for with a key.
func (c *Capsules) asked(ctx context.Context, by Caller, key string) bool {
	_, err := c.cfg.Store.CapsuleByRequest(ctx, by.TeamID, key)
	return err == nil
}

// sumOf returns a sum of a spec that tells nothing of it: it may hold secrets.
func (c *Capsules) sumOf(ctx context.Context, spec nestbox.CapsuleSpec) (string, error) {
	secret, err := c.secret(ctx)
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return "", nestbox.Errorf(nestbox.CodeInternal, "%w", err)
	}
	mac := hmac.New(sha256.New, secret)
	_, _ = mac.Write(append([]byte("capsule\n"), text...)) // a hash never fails
	return hex.EncodeToString(mac.Sum(nil)), nil
}
