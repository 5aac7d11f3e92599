// Command probe runs inside a capsule and measures, or makes, what a benchmark
// compares with: fork+exec and a pipe, without Nestbox in between.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: probe forkexec|pipe|spew|stamp|writefile|readfile|smallfiles <n>")
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	switch args[0] {
	case "forkexec":
		return forkExec(n)
	case "pipe":
		return pipe(n)
	case "spew":
		return spew(n)
	case "stamp":
		return stamp(n)
	case "writefile":
		return writeFile(n)
	case "readfile":
		return readFile(n)
	case "smallfiles":
		return smallFiles(n)
	default:
		return fmt.Errorf("unknown measurement %q", args[0])
	}
}

// forkExec prints the median nanoseconds of starting /bin/true and waiting for
// its end.
func forkExec(n int) error {
	times := make([]time.Duration, n)
	for i := range times {
		begin := time.Now()
		p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}})
		if err != nil {
			return err
		}
		if _, err := p.Wait(); err != nil {
			return err
		}
		times[i] = time.Since(begin)
	}
	slices.Sort(times)
	fmt.Println(times[n/2].Nanoseconds())
	return nil
}

// pipe prints how many nanoseconds it takes to read n MiB from a child that
// spews them.
func pipe(n int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "spew", strconv.Itoa(n))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	begin := time.Now()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, buf); err != nil {
		return err
	}
	fmt.Println(time.Since(begin).Nanoseconds())
	return cmd.Wait()
}

// spew writes n MiB in pieces of 64 KiB.
func spew(n int) error {
	piece := make([]byte, 64<<10)
	for i := range piece {
		piece[i] = byte('a' + i%26)
	}
	for range n * 16 {
		if _, err := os.Stdout.Write(piece); err != nil {
			return err
		}
	}
	return nil
}

// stamp writes n lines that each hold the time at which they were written, in
// nanoseconds since 1970, one whenever it reads a line.
func stamp(n int) error {
	in := bufio.NewScanner(os.Stdin)
	for i := 0; i < n && in.Scan(); i++ {
		if _, err := fmt.Println(time.Now().UnixNano()); err != nil {
			return err
		}
	}
	return in.Err()
}
