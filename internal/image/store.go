package image

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/nestbox/nestbox"
)

// Config is what a Store is made of.
type Config struct {
	Dir  string // which is made if need be
	Host string // root of the machine whose programs the built-in template is made from; "" = /
	CA   []byte // certificates (PEM) that are added to those that programs trust
	Log  *slog.Logger
}

// Store is a directory of images, each of which is a version of a template. One that
// nobody uses, and that no new capsule would start from, is removed. It is safe for
// concurrent use.
type Store struct {
	cfg Config

	mu      sync.Mutex // also held while a version is built
	minimal Root
	host    string         // the hostVersion that minimal is of
	uses    map[string]int // of images, by name
	shy     bool           // there are uses that are not known
}

// NewStore opens the store and builds the built-in template from the programs of this
// machine, unless it is there already. It needs root: files in a template have owners.
//
// Nothing is removed before Sweep.
func NewStore(cfg Config) (*Store, error) {
	var err error
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if cfg.Host == "" {
		cfg.Host = "/"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the template directory: %w", err)
	}
	if err := removeUnfinished(cfg.Dir); err != nil {
		return nil, fmt.Errorf("clear the template directory: %w", err)
	}
	s := &Store{cfg: cfg, uses: map[string]int{}}
	if err := s.build(); err != nil {
		return nil, fmt.Errorf("build the template %s: %w", nestbox.TemplateMinimal, err)
	}
	return s, nil
}

// Acquire returns the root of the built-in template, or of an image that was made, for a
// new capsule, which uses it until Release. What was installed on the host since is in the
// former. CodeNotFound: there is none of that name.
func (s *Store) Acquire(name string) (Root, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if nestbox.ValidImageName(name) {
		root, err := s.made(name)
		if err == nil {
			s.uses[name]++
		}
		return root, err
	}
	if name != nestbox.TemplateMinimal {
		return Root{}, nestbox.Errorf(nestbox.CodeNotFound, "template not found")
	}
	if hostVersion(s.cfg.Host) != s.host {
		before := s.minimal.Image
		if err := s.build(); err != nil {
			s.cfg.Log.Warn("the host's programs have changed, and the template made of them could not be made anew; the one before is used", "error", err)
		} else if s.minimal.Image != before {
			s.cfg.Log.Info("the host's programs have changed: new capsules start from a new image", "image", s.minimal.Image)
			s.removeUnused(before)
		}
	}
	s.uses[s.minimal.Image]++
	return s.minimal, nil
}

// build makes the built-in template. Needs mu, but in NewStore.
func (s *Store) build() error {
	version := hostVersion(s.cfg.Host) // before, so that what changes meanwhile is seen
	root, left, err := buildMinimal(s.cfg.Dir, s.cfg.Host, s.cfg.CA)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		s.cfg.Log.Info("files in /etc that were changed are not in the template", "files", left)
	}
	s.minimal, s.host = root, version
	return nil
}

// Use counts one use more of an image, by a capsule from before. An empty name is an
// image that is not known: then none is removed.
func (s *Store) Use(image string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if image == "" {
		s.shy = true
		return
	}
	s.uses[image]++
}

// Release takes back one use of an image.
func (s *Store) Release(image string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uses[image]--; s.uses[image] <= 0 {
		delete(s.uses, image)
		s.removeUnused(image)
	}
}

// Sweep removes the images that nobody uses, once all uses from before are counted.
func (s *Store) Sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		s.cfg.Log.Warn("looking for images that nobody uses", "error", err)
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), nestbox.TemplateMinimal+"-") || nestbox.ValidImageName(e.Name()) {
			s.removeUnused(e.Name())
		}
	}
}

// removeUnused removes an image, unless somebody uses it or will. Needs mu.
func (s *Store) removeUnused(image string) {
	if s.shy || image == "" || image == s.minimal.Image || s.uses[image] > 0 {
		return
	}
	// Under another name first: half of it is no image.
	going := filepath.Join(s.cfg.Dir, unfinished+image)
	err := os.Rename(filepath.Join(s.cfg.Dir, image), going)
	if err == nil {
		err = os.RemoveAll(going)
	}
	if err != nil && !os.IsNotExist(err) {
		s.cfg.Log.Warn("removing an image that nobody uses; the next start tries again", "image", image, "error", err)
	}
}

// Names returns the names of the templates.
func (s *Store) Names() []string { return []string{nestbox.TemplateMinimal} }

const unfinished = "building-"

func removeUnfinished(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
