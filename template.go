package nestbox

import (
	"maps"
	"regexp"
	"slices"
	"strings"
)

// ImageDefaults are what an image says about the processes that are started from it, as
// far as their caller does not say otherwise. It has the terms of the OCI image
// specification ("Image Configuration").
type ImageDefaults struct {
	Env        map[string]string
	User       string   // as ProcessSpec.User
	Cwd        string   // absolute; "" = the user's home
	Entrypoint []string // with Cmd after it: the image's main program
	Cmd        []string
	Labels     map[string]string
}

// Bounds of what an image says.
const (
	MaxImageArgs   = 64 << 10  // bytes of Entrypoint and Cmd
	MaxImageLabels = 256 << 10 // bytes of names and values
)

// Validate reports the first thing that no process can have, as CodeInvalid.
func (d ImageDefaults) Validate() error {
	if len(d.Env) > MaxCapsuleEnv {
		return Errorf(CodeInvalid, "the image sets more than %d environment variables", MaxCapsuleEnv)
	}
	size := 0
	for _, name := range slices.Sorted(maps.Keys(d.Env)) {
		if err := validateVariable(name, d.Env[name]); err != nil {
			return err
		}
		if !isText(name) || !isText(d.Env[name]) {
			return Errorf(CodeInvalid, "environment variable %.80q of the image is not UTF-8", name)
		}
		if size += len(name) + len(d.Env[name]); size > MaxCapsuleEnvBytes {
			return Errorf(CodeInvalid, "the environment of the image is longer than %d bytes", MaxCapsuleEnvBytes)
		}
	}
	args := append([]string{"/"}, d.Main()...)
	if err := (ProcessSpec{Cmd: args[0], Cwd: d.Cwd, User: d.User}).Validate(); err != nil {
		return err
	}
	if err := textBelow("entry point and command", MaxImageArgs, args); err != nil {
		return err
	}
	return textBelow("labels", MaxImageLabels, slices.Concat(slices.Sorted(maps.Keys(d.Labels)), slices.Sorted(maps.Values(d.Labels))))
}

func textBelow(what string, limit int, texts []string) error {
	size := 0
	for _, text := range texts {
		if !isText(text) {
			return Errorf(CodeInvalid, "%.80q in the image's %s is not UTF-8 without NUL", text, what)
		}
		if size += len(text); size > limit {
			return Errorf(CodeInvalid, "the image's %s are longer than %d bytes", what, limit)
		}
	}
	return nil
}

// Main returns the image's main program with its arguments; empty = it has none.
func (d ImageDefaults) Main() []string { return slices.Concat(d.Entrypoint, d.Cmd) }

// imagePrefix begins the names of images; after it comes a SHA-256 in hex.
const imagePrefix = "sha256-"

var imageName = regexp.MustCompile(`^` + imagePrefix + `[0-9a-f]{64}$`)

// ImageName returns the name of the image with this digest, in hex.
func ImageName(digest string) string { return imagePrefix + strings.ToLower(digest) }

// ValidImageName reports whether s names an image.
func ValidImageName(s string) bool { return imageName.MatchString(s) }
