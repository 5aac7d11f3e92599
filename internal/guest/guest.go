// Package guest declares the contract of the daemon inside a capsule: its
// processes, its files and its ports.
//
// The contract is declared once. internal/guest/envd implements it inside the
// capsule, internal/guest/guestrpc carries it over Connect and is itself a
// Guest, and the host agent lends it onward, so that nothing is declared again
// at each hop. internal/guest/guesttest is the suite that every Guest passes.
//
// It may import the root package only.
package guest

import (
	"context"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/nestbox/nestbox"
)

// Guest is the inside of one running capsule. All methods are safe for
// concurrent use. Errors are *nestbox.Error; CodeGuest means that the daemon
// failed or could not be reached.
type Guest interface {
	// Ping answers when the daemon does.
	Ping(ctx context.Context) (Info, error)
	Processes() Processes
	Files() Files
	// Dial connects to a TCP port inside the capsule, also one that listens
	// on its loopback only. CodeUnavailable if nothing listens.
	Dial(ctx context.Context, port uint16) (net.Conn, error)
}

// Info is what a daemon says of itself. A capsule keeps the daemon that it was
// started with, which may be older than its caller.
type Info struct {
	Version   string
	StartedAt time.Time
	Features  []Feature
}

// Feature is what a daemon can do beyond the first version of this contract. A
// call that needs one that the daemon lacks is CodeUnsupported.
type Feature string

// The features.
const (
	// FeatureProcessID: processes have ids, and selectors can name them by those.
	FeatureProcessID Feature = "process-id"
	// FeatureKillBiggest: there is KillBiggest.
	FeatureKillBiggest Feature = "kill-biggest"
	// FeatureTerminal: processes can have terminals.
	FeatureTerminal Feature = "terminal"
	// FeatureWatch: there is Files.Watch.
	FeatureWatch Feature = "watch"
	// FeatureArchive: there are Files.Pack and Files.Unpack.
	FeatureArchive Feature = "archive"
	// FeatureReadFrom: Files.Read can begin at an offset.
	FeatureReadFrom Feature = "read-from"
	// FeatureWriteOptions: Files.Write knows all of WriteOptions, and Mode and User of files that exist.
	FeatureWriteOptions Feature = "write-options"
	// FeatureLocate: there is Processes.Locate, and readers can have times.
	FeatureLocate Feature = "locate"
	// FeatureTree: there is Processes.Tree.
	FeatureTree Feature = "tree"
	// FeatureMerge: standard output and error of a process can be one stream.
	FeatureMerge Feature = "merge"
	// FeatureStartAgain: a start knows OnConflict and RequestKey.
	FeatureStartAgain Feature = "start-again"
	// FeatureIdleTimeout: a process can be killed for its silence.
	FeatureIdleTimeout Feature = "idle-timeout"
	// FeaturePutFile: Files.Write of little is one message on the wire.
	FeaturePutFile Feature = "put-file"
)

// Features are those of this version.
func Features() []Feature {
	return []Feature{
		FeatureProcessID, FeatureKillBiggest, FeatureTerminal, FeatureWatch, FeatureArchive, FeatureReadFrom, FeatureWriteOptions,
		FeaturePutFile, FeatureMerge, FeatureIdleTimeout, FeatureLocate, FeatureTree,
		FeatureStartAgain,
	}
}

// Processes are the processes of a capsule that were started by the API, dead
// ones included as long as they are remembered.
type Processes interface {
	// Start execs the program and returns its record. It returns before the
	// program writes or ends. With a non-nil attach, the returned reader was
	// attached before the first byte was read, so that a lossless one misses
	// nothing; without, the reader is nil. The process outlives ctx, the
	// reader and the caller.
	//
	// CodeInvalid: bad spec, or no such program, user or directory.
	// CodeConflict: a live process has the tag, or the key was used for another spec.
	// CodeExhausted: no more
	// processes can be started.
	Start(ctx context.Context, spec nestbox.ProcessSpec, attach *Attach) (nestbox.Process, OutputReader, error)

	// List returns the live processes, or with all also the remembered ones,
	// in the order of their start. Of arguments a record has at most
	// nestbox.MaxListedArgs bytes, or less if there are very many records.
	List(ctx context.Context, all bool) ([]nestbox.Process, error)

	// Tree returns all processes of the capsule but the daemon, by PID, with the ports
	// that they listen on. CodeTooLarge: there are more than nestbox.MaxTree.
	Tree(ctx context.Context) ([]nestbox.SystemProcess, error)

	// Get returns one record. CodeNotFound if nothing is known by sel.
	Get(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error)

	// Wait returns the record once the process has ended. It ends early, with
	// ctx's error as CodeTimeout or CodeCanceled, when ctx does.
	Wait(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error)

	// Attach returns a reader of the process's output log. ctx bounds the call,
	// not the reader: that lives until Close, or until Next fails.
	Attach(ctx context.Context, sel nestbox.Selector, attach Attach) (OutputReader, error)

	// Locate returns the offset of the output log at which since begins, counting only
	// the lines of one stream if stream is not "".
	Locate(ctx context.Context, sel nestbox.Selector, since nestbox.Since, stream nestbox.Stream) (int64, error)

	// WriteStdin writes all of data (which may be empty), then closes standard
	// input if eof, which a terminal cannot (CodeInvalidState; a program there takes a
	// Ctrl-D for the end). It waits while the pipe is full, until ctx ends.
	// CodeInvalidState: the process has no open standard input.
	WriteStdin(ctx context.Context, sel nestbox.Selector, data []byte, eof bool) error

	// Resize changes the size of the process's terminal, of which its programs are told.
	// CodeInvalidState: it has ended, or has no terminal.
	Resize(ctx context.Context, sel nestbox.Selector, rows, cols int) error

	// Signal sends sig to the process's leader and to its process group.
	// CodeInvalidState: it has ended.
	Signal(ctx context.Context, sel nestbox.Selector, sig syscall.Signal) error

	// Kill ends the whole tree, also descendants that made a session of their
	// own or whose parents are gone, and returns the record when none is left.
	// The leader's end is ReasonKilled. Killing what has ended already kills
	// what is left of its tree; CodeNotFound if nothing is known by sel.
	Kill(ctx context.Context, sel nestbox.Selector, how Kill) (nestbox.Process, error)

	// KillBiggest kills the tree that holds the most memory, because the capsule
	// has run out of it. It returns when that has begun, since the programs may be
	// made to stand still as long as it runs. The leader's end is ReasonOOM. The
	// daemon is never chosen. used is how much memory the capsule uses, in bytes:
	// what of it no process maps is looked for in open files. CodeNotFound: nothing
	// is left to kill.
	KillBiggest(ctx context.Context, used int64) (Victim, error)
}

// Victim is a tree that KillBiggest kills.
type Victim struct {
	Process nestbox.Process // its leader; zero if it is none that is remembered
	Memory  int64           // what the tree held, in bytes, roughly
}

// Attach says how a reader reads.
type Attach struct {
	Since nestbox.Since // not one that is Sought: see Locate
	// Times has events of data say when it was read. There are more of them then.
	Times bool
	// Lossless makes the process wait for this reader rather than let bytes
	// that it has not read yet be dropped, as long as it is attached.
	Lossless bool
}

// OutputReader is a cursor over one process's output log. It is used by one
// goroutine at a time.
type OutputReader interface {
	// Next returns the next event, waiting for it if need be. The event's Data
	// is valid until the following Next or Close. io.EOF follows EventClosed.
	// Any other error means that the reader is cut: attach again from the
	// offset that was reached.
	Next(ctx context.Context) (nestbox.OutputEvent, error)
	io.Closer
}

// Kill says how to end a process tree.
type Kill struct {
	Signal syscall.Signal // sent first; 0 = SIGKILL
	Grace  time.Duration  // how long after Signal the rest gets SIGKILL; 0 with SIGKILL, else 0 = DefaultGrace
}

// DefaultGrace is how long a tree has to end after a signal other than SIGKILL.
const DefaultGrace = 5 * time.Second

// Files are the files of a capsule. Paths are absolute, and text as
// nestbox.PathText makes it. One that ends with a slash
// means a directory, and is CodeInvalid where a file is wanted. CodeNotFound: no such
// path. CodeConflict: something of another kind, or of that name, is there.
// CodeExhausted: the disk is full.
type Files interface {
	// Read opens a regular file at an offset, in bytes; behind its end there is
	// nothing. CodeInvalid if it is something else. The FileInfo is the opened
	// file's, also behind a symlink. Reading fails once ctx has ended.
	Read(ctx context.Context, path string, from int64) (io.ReadCloser, nestbox.FileInfo, error)

	// Write replaces path with all of r, making missing parents. The old file
	// stays as it was until all of r is there: if r or ctx fails, nothing
	// changes. An existing file keeps its owner and mode unless opts say others. If r is a Stopper it is
	// stopped as soon as the answer is known, so that a slow one is not waited for. One
	// that is a Sized and small is sent at once, for speed.
	Write(ctx context.Context, path string, r io.Reader, opts WriteOptions) (nestbox.FileInfo, error)

	Stat(ctx context.Context, path string) (nestbox.FileInfo, error)

	// List returns the entries below a directory, depth levels deep (at least
	// 1), sorted by path. Symlinks are not followed. CodeTooLarge if there are
	// more than nestbox.MaxListEntries.
	List(ctx context.Context, path string, depth int) ([]nestbox.FileInfo, error)

	// Mkdir makes a directory and its missing parents. CodeConflict if path
	// exists already.
	Mkdir(ctx context.Context, path string) (nestbox.FileInfo, error)

	// Remove removes path and everything below it. Nothing there is no error.
	// CodeInvalid for "/" and for mount points that cannot be removed.
	Remove(ctx context.Context, path string) error

	// Pack writes a tar archive of path to w: of a file or a symlink itself, or of a
	// directory and all below it. begin is called before that, when it is known that
	// there is something to pack; nil = not. What vanishes meanwhile is left out. It returns what
	// could not be packed as it was. An error of w or begin is returned as it is.
	Pack(ctx context.Context, path string, opts PackOptions, w io.Writer, begin func() error) (warnings []string, err error)

	// Unpack unpacks a tar archive, which may be compressed, into the directory path,
	// which is made if it is missing, and then gets the attributes that the archive has
	// for "./". Nothing outside of it is made or changed. What was
	// unpacked before an error stays, and the error's message says what that is; a
	// file that was to be replaced by one that did not come whole stays as it was.
	// CodeInvalid: it is no archive, or is cut off. If r is a Stopper it is stopped as soon
	// as the answer is known.
	Unpack(ctx context.Context, path string, r io.Reader, opts UnpackOptions) (nestbox.Unpacked, error)

	// Watch tells what happens to path from when it returns: to a file, to a
	// directory and what is in it, or with recursive to the whole tree below it,
	// also to what is made there later. A symlink at path is followed, those below
	// are not. Of a file it is the name that is watched: one that takes its place
	// is a create. What Write writes is a write (and a create, if it is new). ctx
	// bounds the call, not the watch, which lives until Close, or until Next fails.
	//
	// CodeInvalid: the kernel reports no changes there, as in /proc. CodeExhausted:
	// those are too many watches, or directories. CodeTooLarge: the tree is too deep.
	Watch(ctx context.Context, path string, recursive bool) (FileWatch, error)
}

// PackOptions say what is packed, and how.
type PackOptions struct {
	// Contents packs a directory as "./", and what is in it without the directory's
	// name. It follows a symlink to one.
	Contents    bool
	Compression nestbox.Compression
}

// UnpackOptions say how an archive is unpacked.
type UnpackOptions struct {
	User       string // owner of everything; "" = root
	KeepOwners bool   // those that the archive names, by their numbers; User does not count then
	// KeepKind refuses to put a file where a directory is, or a directory where a
	// file is. Without, what is there is removed.
	KeepKind bool
}

// FileWatch is a watch of files. It is used by one goroutine at a time.
type FileWatch interface {
	// Next returns at least one event, waiting for it if need be, and with it those
	// that have come, up to MaxWatchBatch. They are valid until the following Next or Close.
	// io.EOF: what was watched is gone; its removal or renaming was the last event. Any
	// other error means that the watch is over: those that Watch returns are possible, as
	// directories come to be.
	Next(ctx context.Context) ([]nestbox.FileEvent, error)
	io.Closer
}

// MaxWatchBatch is how many events FileWatch.Next returns at most.
const MaxWatchBatch = 256

// Sized is a reader that may know how many bytes are left in it; negative = it does
// not. It is a bytes.Reader's method.
type Sized interface {
	Len() int
}

// Stopper is a reader whose Read another goroutine can end.
type Stopper interface {
	// Stop makes the Read under way, and those that follow, return soon.
	Stop()
}

// WriteOptions say how a file is written.
type WriteOptions struct {
	Mode       uint32    // permission bits; 0 = those of the file that is there, 0644 of a new one
	User       string    // owner, also of parents that are made; "" = that of the file that is there, else root
	ModifiedAt time.Time // zero = now

	// Append adds r to the end of the file rather than replace it, so that readers
	// see it as it comes. If r or ctx fails, what was added is taken away again, unless
	// somebody else has written behind it.
	Append bool

	// Conditions, whose failure is CodePrecondition: IfAbsent, that nothing is there;
	// IfVersion, if any, that the file is there and its FileInfo.Version is one of
	// them ("*" = any). No other write through the API comes between them and the
	// replacing.
	IfAbsent  bool
	IfVersion []string
}

// MaxVersions bounds WriteOptions.IfVersion.
const MaxVersions = 16
