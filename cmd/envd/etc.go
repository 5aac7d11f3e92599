package main

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/nestbox/nestbox/internal/sandbox"
)

// writeEtc writes the files that are the capsule's own and not its image's. They replace
// what is there, which may be links to places that are not.
func writeEtc(dir, hostname, nameserver string) error {
	var errs []error
	for name, text := range map[string]string{
		"hostname":    hostname + "\n",
		"hosts":       sandbox.Hosts(hostname),
		"resolv.conf": sandbox.ResolvConf(nameserver),
	} {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, os.WriteFile(path, []byte(text), 0o644))
	}
	return errors.Join(errs...)
}
