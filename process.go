package nestbox

import (
	"cmp"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// ProcessSpec says what to start. It is the same for foreground exec,
// background processes, streams and terminals.
type ProcessSpec struct {
	Cmd   string            // a path, or a name looked up in the PATH of Env
	Args  []string          // arguments after the command's own name
	Env   map[string]string // added to, and winning over, the user's base environment
	Cwd   string            // absolute; empty = the user's home
	User  string            // a name or number of the capsule's users; empty = root
	Tag   string            // empty = a new proc-<8 hex>
	Stdin bool              // keep standard input open for WriteStdin; otherwise it is /dev/null
	// Terminal has the process run in a terminal of its own, of which it is the
	// controlling one: standard input, output and error are it. Its output is the one
	// stream Pty, and its input is open. nil = pipes.
	Terminal *Terminal
	// Merge has standard error be the same pipe as standard output, so that what is
	// written to both keeps its order, and all of it is of the stream Stdout. It is for
	// processes without a Terminal.
	Merge       bool
	Timeout     time.Duration // 0 = none; then the whole tree is killed, with ReasonTimeout
	IdleTimeout time.Duration // 0 = none; after so long without output it is killed, with ReasonIdle
	// OnConflict is what to do if a live process has the Tag; "" = CodeConflict.
	OnConflict TagConflict
	// RequestKey, if not empty, makes asking again safe: of all starts with the same key
	// one starts a process, and all return it, for as long as it is remembered. CodeConflict:
	// the key was used with another spec.
	RequestKey string
}

// TagConflict is what a start does if a live process has its tag.
type TagConflict string

// What can be done.
const (
	ConflictReplace TagConflict = "replace" // end that process, with SIGTERM and after five seconds SIGKILL, and start
	ConflictReturn  TagConflict = "return"  // start nothing, and return that process
)

// MaxRequestKey is how long a RequestKey may be, in bytes.
const MaxRequestKey = 255

// ValidateRequestKey returns CodeInvalid for what cannot be a key: it is of printable
// ASCII characters.
func ValidateRequestKey(key string) error {
	if len(key) > MaxRequestKey || strings.ContainsFunc(key, func(r rune) bool { return r < ' ' || r > '~' }) {
		return Errorf(CodeInvalid, "an idempotency key has at most %d printable ASCII characters", MaxRequestKey)
	}
	return nil
}

// Terminal is the terminal of a process. Zero values mean the defaults.
type Terminal struct {
	Rows int    // 0 = 24
	Cols int    // 0 = 80
	Term string // the variable TERM, if the environment that was asked for has none; "" = xterm-256color
}

// Bounds of a Terminal.
const (
	MaxTerminalSize = 4096 // rows, and columns
	maxTermBytes    = 64
)

// WithDefaults fills in what was not asked for.
func (t Terminal) WithDefaults() Terminal {
	t.Rows, t.Cols, t.Term = cmp.Or(t.Rows, 24), cmp.Or(t.Cols, 80), cmp.Or(t.Term, "xterm-256color")
	return t
}

// Validate reports the first thing that is wrong, as CodeInvalid.
func (t Terminal) Validate() error {
	if t.Rows < 0 || t.Rows > MaxTerminalSize || t.Cols < 0 || t.Cols > MaxTerminalSize {
		return Errorf(CodeInvalid, "a terminal has up to %[1]d rows and %[1]d columns, not %[2]d and %[3]d", MaxTerminalSize, t.Rows, t.Cols)
	}
	if len(t.Term) > maxTermBytes || strings.ContainsFunc(t.Term, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
		return Errorf(CodeInvalid, "term %.80q is no name of a terminal, such as xterm-256color", t.Term)
	}
	return nil
}

// Bounds of a ProcessSpec.
const (
	MaxCmdBytes  = 4096
	MaxArgs      = 4096
	MaxArgBytes  = 128 << 10 // one argument (Linux: MAX_ARG_STRLEN)
	MaxSpecBytes = 1 << 20   // command, arguments and environment together
	MaxTagBytes  = 64
	MaxStdin     = 4 << 20 // one WriteStdin

	// MaxListedArgs is how many bytes of a process's arguments a list shows; Get
	// has them all.
	MaxListedArgs = 4 << 10
)

var tagPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,63}$`)

// ValidTag reports whether s can be a tag: 1 to 64 letters, digits and
// ._:@- that begin with a letter or digit and are not all digits (a selector
// of digits is a PID).
func ValidTag(s string) bool { return tagPattern.MatchString(s) && !allDigits(s) }

// NewTag returns a new default tag.
func NewTag() string { return "proc-" + RandomHex(4) }

// Validate reports the first thing that is wrong, as CodeInvalid.
func (s ProcessSpec) Validate() error {
	switch {
	case s.Cmd == "":
		return Errorf(CodeInvalid, "cmd is required")
	case len(s.Cmd) > MaxCmdBytes:
		return Errorf(CodeInvalid, "cmd is longer than %d bytes", MaxCmdBytes)
	case strings.ContainsRune(s.Cmd, 0):
		return Errorf(CodeInvalid, "cmd contains a NUL byte")
	case len(s.Args) > MaxArgs:
		return Errorf(CodeInvalid, "more than %d args", MaxArgs)
	case s.Tag != "" && !ValidTag(s.Tag):
		return Errorf(CodeInvalid, "tag %.80q is not valid: 1 to %d letters, digits and ._:@- that begin with a letter or digit and are not all digits", s.Tag, MaxTagBytes)
	case s.Cwd != "" && !strings.HasPrefix(s.Cwd, "/"):
		return Errorf(CodeInvalid, "cwd %.80q is not an absolute path", s.Cwd)
	case strings.ContainsRune(s.Cwd, 0) || len(s.Cwd) > MaxCmdBytes:
		return Errorf(CodeInvalid, "cwd is not a valid path")
	case len(s.User) > 256 || strings.ContainsAny(s.User, "\x00\n") || strings.Count(s.User, ":") > 1:
		return Errorf(CodeInvalid, "user is not a valid name, nor user:group")
	case s.Timeout < 0:
		return Errorf(CodeInvalid, "timeout is negative")
	case s.OnConflict != "" && s.OnConflict != ConflictReplace && s.OnConflict != ConflictReturn:
		return Errorf(CodeInvalid, "on_conflict %.40q is neither replace nor return", s.OnConflict)
	case s.OnConflict != "" && s.Tag == "":
		return Errorf(CodeInvalid, "on_conflict needs a tag")
	case ValidateRequestKey(s.RequestKey) != nil:
		return ValidateRequestKey(s.RequestKey)
	case s.IdleTimeout < 0:
		return Errorf(CodeInvalid, "idle_timeout is negative")
	case s.Merge && s.Terminal != nil:
		return Errorf(CodeInvalid, "the output of a terminal is one stream already: merge goes with no terminal")
	}
	if s.Terminal != nil {
		if err := s.Terminal.Validate(); err != nil {
			return err
		}
	}
	size := len(s.Cmd)
	for i, a := range s.Args {
		if strings.ContainsRune(a, 0) {
			return Errorf(CodeInvalid, "args[%d] contains a NUL byte", i)
		}
		if len(a) >= MaxArgBytes {
			return Errorf(CodeInvalid, "args[%d] is longer than %d bytes", i, MaxArgBytes-1)
		}
		size += len(a)
	}
	for k, v := range s.Env {
		if err := validateVariable(k, v); err != nil {
			return err
		}
		size += len(k) + len(v)
	}
	if size > MaxSpecBytes {
		return Errorf(CodeInvalid, "command, arguments and environment are together longer than %d bytes", MaxSpecBytes)
	}
	return nil
}

func validateVariable(name, value string) error {
	if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
		return Errorf(CodeInvalid, "environment variable %.80q is not valid: a name is not empty and has no '=' or NUL, a value has no NUL", name)
	}
	if len(name)+len(value)+1 >= MaxArgBytes {
		return Errorf(CodeInvalid, "environment variable %.80q is longer than %d bytes", name, MaxArgBytes-1)
	}
	return nil
}

// ProcessID names one process of a capsule for ever: unlike a PID or a tag it
// is never used again. 0 is no process.
type ProcessID uint64

// maxProcessID is the largest that JSON numbers, SQL and protocols all carry.
const maxProcessID = 1<<53 - 1

// String returns the form that selectors and the wire have: @ and the number,
// which is neither a PID nor a tag. It is "" for 0.
func (id ProcessID) String() string {
	if id == 0 {
		return ""
	}
	return "@" + strconv.FormatUint(uint64(id), 10)
}

// Valid reports whether id can be that of a process.
func (id ProcessID) Valid() bool { return id > 0 && id <= maxProcessID }

// ParseProcessID reads what String writes. CodeInvalid: anything else.
func ParseProcessID(s string) (ProcessID, error) {
	digits, marked := strings.CutPrefix(s, "@")
	n, err := strconv.ParseUint(digits, 10, 64)
	if id := ProcessID(n); marked && err == nil && id.Valid() && id.String() == s {
		return id, nil
	}
	return 0, Errorf(CodeInvalid, "%.40q is not a process id, such as @7", s)
}

// Process is the record of a process: alive, or dead and remembered.
type Process struct {
	ID        ProcessID
	PID       int // as seen inside the capsule; the kernel may give it to another process after the exit
	Tag       string
	Cmd       string
	Args      []string
	ArgsCut   bool // there are more, or longer, arguments than Args has: in a list, or because all processes' were too large to be kept
	Cwd       string
	User      string
	Stdin     bool // standard input is open for WriteStdin
	StartedAt time.Time
	Exit      *Exit     // nil while the process lives
	Terminal  *Terminal // as it is now; nil = it has none
	Output    OutputState
}

// Running reports whether the process's leader is alive.
func (p Process) Running() bool { return p.Exit == nil }

// OutputState says what the output log of a process holds. Offsets count the
// bytes of all streams together, in the order they were read.
type OutputState struct {
	Start  int64 // offset of the oldest byte that is kept
	End    int64 // offset after the newest byte: everything written so far
	Stdout int64 // bytes that came from stdout
	Stderr int64 // bytes that came from stderr
	Pty    int64 // bytes that came from the terminal
	Closed bool  // no more output can come: every holder of the pipes is gone
}

// Exit is how a process ended.
type Exit struct {
	Code   int    // exit status, or 128 + the signal's number, as shells report it
	Signal string // "SIGKILL", … if a signal ended it, else ""
	Reason ExitReason
	At     time.Time
}

// ExitReason is why a process ended.
type ExitReason string

// The reasons.
const (
	ReasonExited    ExitReason = "exited"       // by itself, with a status
	ReasonSignalled ExitReason = "signalled"    // by a signal that did not come from our API's kill
	ReasonKilled    ExitReason = "killed"       // because Kill was asked for
	ReasonTimeout   ExitReason = "timeout"      // because its Timeout ran out
	ReasonIdle      ExitReason = "idle_timeout" // because it wrote nothing for its IdleTimeout
	ReasonOOM       ExitReason = "oom"          // because the capsule ran out of memory
)

// Selector names one process of a capsule, by one of three. A PID or a tag that
// was used again means the newest process that has it.
type Selector struct {
	ID  ProcessID // written @7
	PID int       // written as digits alone
	Tag string    // written as it is
}

// ParseSelector reads a selector as it stands in a URL.
func ParseSelector(s string) (Selector, error) {
	if strings.HasPrefix(s, "@") {
		id, err := ParseProcessID(s)
		return Selector{ID: id}, err
	}
	if allDigits(s) {
		n, err := strconv.ParseInt(s, 10, 32)
		if err != nil || n == 0 || s[0] == '0' {
			return Selector{}, Errorf(CodeInvalid, "%.40q is not a PID", s)
		}
		return Selector{PID: int(n)}, nil
	}
	if !ValidTag(s) {
		return Selector{}, Errorf(CodeInvalid, "%.80q is no process id, PID or tag", s)
	}
	return Selector{Tag: s}, nil
}

// String returns the form that ParseSelector reads.
func (s Selector) String() string {
	switch {
	case s.ID != 0:
		return s.ID.String()
	case s.Tag != "":
		return s.Tag
	}
	return strconv.Itoa(s.PID)
}

func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// Stream names what output came from.
type Stream string

// The streams.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
	Pty    Stream = "pty" // the terminal, which is the only stream of a process that has one
)

// OutputEventKind says which fields of an OutputEvent are set.
type OutputEventKind string

// The kinds. A reader sees data and gaps in offset order, exactly one exit
// (when the leader is reaped, between or after data), and as the last event
// closed, after which Next returns io.EOF.
const (
	EventData   OutputEventKind = "data"   // Stream, Offset, Data
	EventGap    OutputEventKind = "gap"    // Offset = From, To: bytes [From, To) are no longer kept
	EventExit   OutputEventKind = "exit"   // Exit; Offset = where the log stood
	EventClosed OutputEventKind = "closed" // Offset = end of the log, for good
)

// OutputEvent is one step of a reader through an output log.
type OutputEvent struct {
	Kind   OutputEventKind
	Stream Stream
	Offset int64 // of the first byte of Data
	Data   []byte
	At     time.Time // when Data was read, to LogTick; zero if nobody asked for it
	To     int64
	Exit   *Exit
}

// LogTick is how exactly a log keeps when its bytes were read.
const LogTick = 10 * time.Millisecond

// End returns the offset to resume from after this event.
func (e OutputEvent) End() int64 {
	switch e.Kind {
	case EventData:
		return e.Offset + int64(len(e.Data))
	case EventGap:
		return e.To
	default:
		return e.Offset
	}
}

// Since says where a reader begins. The zero value is the oldest byte kept.
type Since struct {
	Now    bool  // from the current end: only what comes
	Offset int64 // from this offset (0 = the very first byte; a gap event tells what is gone)
	Tail   int64 // > 0: at most so many bytes before the current end, if Offset is 0

	// What only the log itself can tell; the later of both, if both are set.
	Lines int64     // > 0: the last so many lines
	After time.Time // not zero: what was read then or later
}

// Sought reports whether the log has to be asked where that is.
func (s Since) Sought() bool { return s.Lines > 0 || !s.After.IsZero() }

// Begins returns the offset at which a reader of a log that stands so begins, unless
// it is Sought.
// From there on nothing is missing: what is dropped before the reader gets to it
// is a gap.
func (s Since) Begins(log OutputState) int64 {
	switch {
	case s.Now:
		return log.End
	case s.Offset > 0:
		return s.Offset
	case s.Tail > 0:
		return max(log.Start, log.End-s.Tail)
	default:
		return log.Start
	}
}

// ParseSince reads "start", "now", an offset, how long ago as a duration such as 5m,
// or a time as RFC 3339 has it.
func ParseSince(s string) (Since, error) {
	switch s {
	case "", "start":
		return Since{}, nil
	case "now":
		return Since{Now: true}, nil
	}
	if ago, err := time.ParseDuration(s); err == nil && ago >= 0 && !allDigits(s) {
		return Since{After: time.Now().Add(-ago)}, nil
	}
	if at, err := time.Parse(time.RFC3339, s); err == nil && !at.IsZero() {
		return Since{After: at}, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || !allDigits(s) {
		return Since{}, Errorf(CodeInvalid, "since must be start, now, a byte offset, a duration such as 5m, or a time such as 2026-01-02T15:04:05Z, not %.40q", s)
	}
	return Since{Offset: n}, nil
}

// SplitUTF8 returns how many bytes of b can be sent as text now: all but an
// incomplete rune at the end. What is no UTF-8 at all is not held back.
func SplitUTF8(b []byte) int {
	for i := 1; i <= utf8.UTFMax-1 && i <= len(b); i++ {
		c := b[len(b)-i]
		if utf8.RuneStart(c) {
			if !utf8.FullRune(b[len(b)-i:]) {
				return len(b) - i
			}
			break
		}
	}
	return len(b)
}
