package nestbox

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Capsule is one isolated Linux environment, as the control plane knows it.
type Capsule struct {
	ID     string
	TeamID string
	HostID string
	CapsuleSpec
	State        CapsuleState
	Reason       string // why it is in State, when that needs saying: "capsule died: …"
	CreatedAt    time.Time
	StartedAt    time.Time // zero until it first ran
	LastActiveAt time.Time
	UpdatedAt    time.Time

	// Request is the idempotency key with which it was asked for, and a sum of what was
	// asked; zero = it was asked for without.
	Request CapsuleRequest

	// EnvNames are the names of what is in Env, in order.
	EnvNames []string

	// Ports are the settings of those ports that have some.
	Ports map[uint16]PortSettings

	// UnresponsiveSince is since when the daemon of a running capsule has not
	// answered; zero = it does. It is asked of the host and not kept.
	UnresponsiveSince time.Time
}

// CapsuleRequest tells the same request for a capsule from another one.
type CapsuleRequest struct{ Key, Sum string }

// CapsuleSpec is every setting of a capsule: what a caller asks for, what the
// store and the host agent keep, and what travels between them.
type CapsuleSpec struct {
	Template   string            // what it starts from; "" = TemplateMinimal
	Image      string            // of Template, as the host knows it; "" = the one that the host has by the template's name
	Defaults   ImageDefaults     // of Image; the host alone keeps them
	Name       string            // one live capsule's of its team; "" = none
	Hostname   string            // as programs see it; "" = the capsule's id
	Env        map[string]string // of all processes, as far as they do not say otherwise; the values are kept by the host alone
	Resources  Resources
	TimeoutSec int               // after so many seconds in which nobody used it, it is destroyed; 0 = never
	Metadata   map[string]string // the caller's own notes
	Network    *NetworkPolicy    // what it may reach outside; nil = what the operator has for new capsules
}

// WithDefaults fills in what was not asked for.
func (s CapsuleSpec) WithDefaults() CapsuleSpec {
	if s.Template == "" {
		s.Template = TemplateMinimal
	}
	s.Resources = s.Resources.WithDefaults()
	return s
}

// NetworkPolicy returns Network; of a spec that has none, the one that lets nothing out.
func (s CapsuleSpec) NetworkPolicy() NetworkPolicy {
	if s.Network == nil {
		return NetworkPolicy{}
	}
	return *s.Network
}

// Validate reports the first setting that is not possible, as CodeInvalid. It
// wants a spec with its defaults.
func (s CapsuleSpec) Validate() error {
	if !ValidTemplateName(s.Template) {
		return Errorf(CodeInvalid, "template %.80q is not a valid name: 1 to 64 letters, digits and ._- that begin with a letter or digit", s.Template)
	}
	if s.Image != "" && !ValidImageName(s.Image) {
		return Errorf(CodeInvalid, "image %.80q is not a valid name", s.Image)
	}
	if err := s.Defaults.Validate(); err != nil {
		return err
	}
	if err := s.Resources.Validate(); err != nil {
		return err
	}
	if s.TimeoutSec < 0 || s.TimeoutSec > MaxTimeoutSec {
		return Errorf(CodeInvalid, "timeout_sec must be between 0 and %d, not %d", MaxTimeoutSec, s.TimeoutSec)
	}
	if s.Name != "" && !ValidCapsuleName(s.Name) {
		return Errorf(CodeInvalid, "name %.80q is not valid: 1 to 63 of a-z, 0-9 and -, neither first nor last a dash, and not like an id (cl-…)", s.Name)
	}
	if s.Hostname != "" && !hostnamePattern.MatchString(s.Hostname) {
		return Errorf(CodeInvalid, "hostname %.80q is not valid: 1 to 63 letters, digits and -, neither first nor last a dash", s.Hostname)
	}
	if len(s.Env) > MaxCapsuleEnv {
		return Errorf(CodeInvalid, "envs has more than %d entries", MaxCapsuleEnv)
	}
	size := 0
	for k, v := range s.Env {
		if err := validateVariable(k, v); err != nil {
			return err
		}
		if !isText(k) || !isText(v) {
			return Errorf(CodeInvalid, "environment variable %.80q is not UTF-8", k)
		}
		if size += len(k) + len(v); size > MaxCapsuleEnvBytes {
			return Errorf(CodeInvalid, "envs is longer than %d bytes", MaxCapsuleEnvBytes)
		}
	}
	if len(s.Metadata) > MaxMetadata {
		return Errorf(CodeInvalid, "metadata has more than %d entries", MaxMetadata)
	}
	if s.Network != nil {
		if err := s.Network.Validate(); err != nil {
			return err
		}
	}
	for k, v := range s.Metadata {
		if k == "" || len(k) > MaxMetadataKey || !isText(k) {
			return Errorf(CodeInvalid, "metadata key %.80q is not 1 to %d bytes of UTF-8 without NUL", k, MaxMetadataKey)
		}
		if len(v) > MaxMetadataValue || !isText(v) {
			return Errorf(CodeInvalid, "metadata value of %.80q is not at most %d bytes of UTF-8 without NUL", k, MaxMetadataValue)
		}
	}
	return nil
}

var (
	capsuleName     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	hostnamePattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)
)

// ValidCapsuleName reports whether s can name a capsule. What looks like an id cannot.
func ValidCapsuleName(s string) bool {
	return capsuleName.MatchString(s) && !strings.HasPrefix(s, PrefixCapsule)
}

func isText(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }

// Resources are the limits of a capsule. All are always set.
type Resources struct {
	VCPUs    int
	MemoryMB int // MiB
	DiskMB   int // MiB of the writable layer
	PidsMax  int // processes and threads inside the capsule
}

// DefaultResources are what a capsule gets when nothing else was asked for.
var DefaultResources = Resources{VCPUs: 1, MemoryMB: 512, DiskMB: 5120, PidsMax: 4096}

// Bounds of what can be asked for.
const (
	MaxVCPUs         = 64
	MinMemoryMB      = 64
	MaxMemoryMB      = 256 << 10
	MinDiskMB        = 16
	MaxDiskMB        = 1 << 20
	MinPids          = 32
	MaxPids          = 1 << 16
	MaxMetadata      = 64      // entries
	MaxMetadataKey   = 128     // bytes
	MaxMetadataValue = 4096    // bytes
	MaxTimeoutSec    = 1 << 31 // about 68 years

	MaxCapsuleEnv      = 256      // variables
	MaxCapsuleEnvBytes = 64 << 10 // of all names and values
)

// WithDefaults replaces values that are zero or negative.
func (r Resources) WithDefaults() Resources {
	or := func(v, def int) int {
		if v <= 0 {
			return def
		}
		return v
	}
	d := DefaultResources
	return Resources{or(r.VCPUs, d.VCPUs), or(r.MemoryMB, d.MemoryMB), or(r.DiskMB, d.DiskMB), or(r.PidsMax, d.PidsMax)}
}

// Validate reports the first value that is out of bounds, as CodeInvalid.
func (r Resources) Validate() error {
	for _, c := range []struct {
		name           string
		v, least, most int
	}{
		{"vcpus", r.VCPUs, 1, MaxVCPUs},
		{"memory_mb", r.MemoryMB, MinMemoryMB, MaxMemoryMB},
		{"disk_mb", r.DiskMB, MinDiskMB, MaxDiskMB},
		{"pids_max", r.PidsMax, MinPids, MaxPids},
	} {
		if c.v < c.least || c.v > c.most {
			return Errorf(CodeInvalid, "%s must be between %d and %d, not %d", c.name, c.least, c.most, c.v)
		}
	}
	return nil
}

// TemplateMinimal is the name of the template that is built in.
const TemplateMinimal = "minimal"

var templateName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)

// ValidTemplateName reports whether s can name a template.
func ValidTemplateName(s string) bool { return templateName.MatchString(s) }

// CapsuleState is where a capsule is in its life. The values are those of
// Wrenn's API; StateStopping is shown there as "stopped".
type CapsuleState string

// The states.
const (
	StateStarting CapsuleState = "starting"
	StateRunning  CapsuleState = "running"
	StateStopping CapsuleState = "stopping"
	StateStopped  CapsuleState = "stopped" // final
	StateMissing  CapsuleState = "missing" // its host does not answer
	StateError    CapsuleState = "error"   // its sandbox could not start, or died
)

// Trigger is what moves a capsule from one state to another.
type Trigger string

// The triggers.
const (
	TriggerStarted   Trigger = "started"   // the capsule is up and envd answers
	TriggerFailed    Trigger = "failed"    // the sandbox did not come up
	TriggerCrashed   Trigger = "crashed"   // the capsule died by itself
	TriggerLost      Trigger = "lost"      // the host stopped answering, or has set it aside
	TriggerFound     Trigger = "found"     // the host answers again, and has it
	TriggerDestroy   Trigger = "destroy"   // somebody asked for its end
	TriggerDestroyed Trigger = "destroyed" // everything it used is freed
)

// Transition is one row of the state machine.
type Transition struct {
	Trigger Trigger
	From    []CapsuleState
	To      CapsuleState
	Why     string // one line for docs/states.md
}

// Transitions is the one table of the state machine. A capsule starts in
// StateStarting. docs/states.md is generated from it and the store guards
// every update with it.
var Transitions = []Transition{
	{TriggerStarted, []CapsuleState{StateStarting}, StateRunning, "the capsule is up and envd answers"},
	{TriggerFailed, []CapsuleState{StateStarting}, StateError, "the sandbox did not come up; the reason is kept"},
	{TriggerCrashed, []CapsuleState{StateRunning, StateMissing}, StateError, "the capsule died; the reason is kept"},
	{TriggerLost, []CapsuleState{StateRunning}, StateMissing, "the host stopped answering, or has set the capsule aside; the reason is kept"},
	{TriggerFound, []CapsuleState{StateMissing}, StateRunning, "the host answers again and still has the capsule"},
	{TriggerDestroy, []CapsuleState{StateStarting, StateRunning, StateMissing, StateError, StateStopping}, StateStopping, "destroy was asked for; it works from every state and may be repeated"},
	{TriggerDestroyed, []CapsuleState{StateStopping}, StateStopped, "everything the capsule used is freed"},
}

// Next returns the state that a trigger leads to, or CodeInvalidState.
func (s CapsuleState) Next(t Trigger) (CapsuleState, error) {
	for _, tr := range Transitions {
		if tr.Trigger == t && slices.Contains(tr.From, s) {
			return tr.To, nil
		}
	}
	return s, &Error{Code: CodeInvalidState, Message: fmt.Sprintf("cannot apply %s to a capsule that is %s", t, s)}
}

// Live reports whether the capsule holds, or may hold, resources of a host.
func (s CapsuleState) Live() bool { return s != StateStopped && s != StateError }

// NotRunning returns the CodeInvalidState of what needs a running capsule, for one
// in this state. reason is why it is in the state, for people; "" = not known.
func (s CapsuleState) NotRunning(reason string) *Error {
	text := "capsule is " + string(s)
	switch s {
	case StateStopping: // as the API shows it
		text = "capsule is " + string(StateStopped)
	case StateError:
		text = "capsule died"
	}
	if reason != "" {
		text += ": " + reason
	}
	return &Error{Code: CodeInvalidState, Message: text}
}
