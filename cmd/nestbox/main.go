// Command nestbox is the whole of Nestbox on one machine: the server (control
// plane and host agent), the isolation runtime linked into it, and the client
// commands.
package main

import (
	"os"

	"github.com/nestbox/nestbox/internal/sandbox/gvisor/runsc"
)

func main() {
	runsc.Maybe() // does not return in a process that is to be runsc
	os.Exit(execute(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
