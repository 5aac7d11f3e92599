// Package envdbin finds the envd program that capsules are started with: the
// one embedded in this binary (built with the tag embed_envd, as `make build`
// does), or else a file named envd beside it.
//
// It is a leaf and imports the standard library only.
package envdbin

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nestbox/nestbox/internal/durable"
)

// Find returns the path of an executable envd. An embedded one is written to
// dir first, under a name that tells its content, so that capsules which still
// run an older one keep theirs.
func Find(dir string) (string, error) {
	if len(embedded) > 0 {
		return extract(dir, embedded)
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	beside := filepath.Join(filepath.Dir(self), "envd")
	if _, err := os.Stat(beside); err != nil {
		return "", fmt.Errorf("this nestbox was built without envd and there is none beside it (make build makes one that has it): %w", err)
	}
	return beside, nil
}

func extract(dir string, data []byte) (string, error) {
	sum := sha256.Sum256(data)
	path := filepath.Join(dir, "envd-"+hex.EncodeToString(sum[:8]))
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return path, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return path, durable.WriteFile(path, data, 0o755)
}
