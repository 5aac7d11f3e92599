// Package doctor examines a machine for what Nestbox needs of it, and says what
// is wrong and what to do about it. `nestbox doctor` prints all of it; `nestbox
// up` does the same checks, and starts on no machine on which capsules cannot
// work.
//
// It is a leaf that imports leaves.
package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Status is how bad a finding is.
type Status string

// The statuses.
const (
	OK   Status = "ok"
	Warn Status = "warn" // capsules work, within limits
	Fail Status = "fail" // capsules do not work
)

// Finding is what one check has found.
type Finding struct {
	Check  string `json:"check"`
	Status Status `json:"status"`
	Detail string `json:"detail"`        // what there is, or what is wrong with it
	Fix    string `json:"fix,omitempty"` // what to do about it
}

// Config says what the machine is to be good for.
type Config struct {
	Dir      string // the state directory, which need not exist
	Platform string // gVisor's: systrap, kvm or ptrace
	Egress   bool   // capsules reach the internet unless somebody says otherwise
}

// Examine does all checks, in the order in which what they look at is needed. It
// changes nothing and takes milliseconds.
func Examine(cfg Config) []Finding {
	m := machine{root: "/", calls: kernelCalls}
	var found []Finding
	for _, check := range []struct {
		name string
		f    func(machine, Config) Finding
	}{
		{"kernel", kernel},
		{"privileges", privileges},
		{"control groups", controlGroups},
		{"namespaces", namespaces},
		{"platform", platform},
		{"network", network},
		{"memory", memory},
		{"disk", disk},
		{"state directory", stateDir},
		{"open files", openFiles},
		{"kernel limits", kernelLimits},
		{"template", template},
	} {
		f := check.f(m, cfg)
		f.Check = check.name
		found = append(found, f)
	}
	return found
}

// Worst returns the worst status of the findings.
func Worst(found []Finding) Status {
	worst := OK
	for _, f := range found {
		if f.Status == Fail || worst == OK {
			worst = f.Status
		}
	}
	return worst
}

// Err returns an error that names all that fails, with what to do, or nil.
func Err(found []Finding) error {
	var errs []error
	for _, f := range found {
		if f.Status == Fail {
			errs = append(errs, errors.New(f.Check+": "+f.String()))
		}
	}
	return errors.Join(errs...)
}

// String is the finding without the name of its check, in one line.
func (f Finding) String() string {
	if f.Fix == "" {
		return f.Detail
	}
	return f.Detail + "; to mend it: " + f.Fix
}

func ok(detail string) Finding        { return Finding{Status: OK, Detail: detail} }
func warn(detail, fix string) Finding { return Finding{Status: Warn, Detail: detail, Fix: fix} }
func fail(detail, fix string) Finding { return Finding{Status: Fail, Detail: detail, Fix: fix} }

// machine is what is examined. Tests have other ones.
type machine struct {
	root string // of its file system
	calls
}

// read returns a file's text without the space around it, "" if it cannot be
// read.
func (m machine) read(path string) string {
	text, err := os.ReadFile(filepath.Join(m.root, path))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// number reads a file that holds a number; found is false if it does not.
func (m machine) number(path string) (n int64, found bool) {
	n, err := strconv.ParseInt(m.read(path), 10, 64)
	return n, err == nil
}

// field returns what follows a name at the beginning of a line of a file.
func (m machine) field(path, name string) string {
	for line := range strings.Lines(m.read(path)) {
		if value, found := strings.CutPrefix(line, name); found {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
