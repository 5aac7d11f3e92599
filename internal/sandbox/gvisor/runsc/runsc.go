// Package runsc makes the calling binary able to be runsc, gVisor's command.
// It is linked in so that a host needs one file only. Binaries that start gVisor
// sandboxes, and their tests, call Maybe first of all; nothing else imports
// this package. It may import gVisor and the driver only.
package runsc

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/subcommands"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/gomaxprocs"
	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/flag"

	"github.com/nestbox/nestbox/internal/sandbox/gvisor"
)

// Maybe becomes runsc, and never returns, if the process was started as
// runsc: by a caller with that name as argv[0], or by runsc itself, which starts
// its children under names that begin so, or under /proc/self/exe. Otherwise it
// does nothing. It must be called before anything else happens in main or
// TestMain.
//
// So no program that calls it may start itself as "/proc/self/exe" for its own
// ends: os.Executable does as well.
func Maybe() {
	if len(os.Args) == 0 {
		return
	}
	if os.Args[0] != "/proc/self/exe" && !strings.HasPrefix(filepath.Base(os.Args[0]), "runsc") {
		return
	}
	cli.Run(nil, commands(), nil)
	os.Exit(1)
}

// commands are those that the driver calls, and those that they call.
func commands() map[util.SubCommand]string {
	cmds := map[util.SubCommand]string{}
	for _, c := range []util.SubCommand{
		new(cmd.Create), new(cmd.Start), new(cmd.Run), new(cmd.Exec), new(cmd.State), new(cmd.Delete), new(cmd.Kill),
		new(boot), new(cmd.Gofer), new(sentrycmd.Umount),
	} {
		cmds[c] = ""
	}
	return cmds
}

// kernelThreads is how many threads the sandbox's kernel may run at a time
// beyond one for each of its virtual CPUs. With one virtual CPU, and so one
// thread, the network would wait until the Go runtime notices that the thread
// is in a system call, which costs milliseconds, and six parts in seven of the
// throughput. What the sandbox may use of the host's processors is not changed
// by it: its control group limits that.
const kernelThreads = 1

// boot is runsc's command that becomes the sandbox.
type boot struct{ sentrycmd.Boot }

// Execute implements subcommands.Command.
func (b *boot) Execute(ctx context.Context, f *flag.FlagSet, args ...any) subcommands.ExitStatus {
	if err := setFlags(f); err != nil {
		fmt.Fprintln(os.Stderr, "runsc boot:", err)
		return subcommands.ExitFailure
	}
	gomaxprocs.Add(kernelThreads)
	return b.Boot.Execute(ctx, f, args...)
}

// setFlags sets the flags of boot that annotations ask for.
func setFlags(f *flag.FlagSet) error {
	spec, err := readSpec(f)
	if err != nil {
		return err
	}
	for annotation, value := range spec.Annotations {
		if name, ok := strings.CutPrefix(annotation, gvisor.AnnotationBootFlag); ok {
			if err := f.Set(name, value); err != nil {
				return fmt.Errorf("annotation %s: %w", annotation, err)
			}
		}
	}
	return nil
}

// readSpec reads the specification that boot was handed without touching the
// position or the life of its descriptor, which boot will use.
func readSpec(f *flag.FlagSet) (specs.Spec, error) {
	var spec specs.Spec
	fd, ok := flag.Get(f.Lookup("spec-fd").Value).(int)
	if !ok || fd < 0 {
		return spec, fmt.Errorf("no specification was handed over")
	}
	err := json.NewDecoder(io.NewSectionReader(reader(fd), 0, math.MaxInt64)).Decode(&spec)
	return spec, err
}

type reader int

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	n, err := unix.Pread(int(r), p, off)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}
