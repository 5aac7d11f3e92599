package cli

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
)

var (
	placeholder = regexp.MustCompile(`<([a-z ]+)>`)
	option      = regexp.MustCompile(`\[/[a-z]+\]`)
)

// usual is the validator of a command's arguments: those that its Use names in angle
// brackets, those in square brackets that begin with a slash, and more only if it has a …
func usual(cmd *cobra.Command, args []string) error {
	wanted := placeholder.FindAllStringSubmatch(cmd.Use, -1)
	usage := fmt.Sprintf("%s %s", cmd.CommandPath(), strings.Join(strings.Fields(cmd.Use)[1:], " "))
	if len(args) < len(wanted) {
		var missing []string
		for _, w := range wanted[len(args):] {
			missing = append(missing, w[1])
		}
		return nestbox.Errorf(nestbox.CodeInvalid, "which %s? %s", strings.Join(missing, ", and which "), usage)
	}
	most := len(wanted) + len(option.FindAllString(cmd.Use, -1))
	if len(args) > most && !strings.Contains(cmd.Use, "…") {
		return nestbox.Errorf(nestbox.CodeInvalid, "%q is one argument too many: %s", args[most], usage)
	}
	return nil
}

var signalFlag = regexp.MustCompile(`^-(\d{1,2}|(SIG)?[A-Z]{2,}[0-9]?)$`)

// Args returns a command line in the form that the flags know: kill -9 and kill -HUP
// are kill --signal=….
func Args(args []string) []string {
	if len(args) == 0 || args[0] != "kill" {
		return args
	}
	out := append([]string{}, args...)
	for i, arg := range out {
		if arg == "--" {
			break
		}
		if name := strings.TrimPrefix(arg, "-"); signalFlag.MatchString(arg) {
			if _, err := nestbox.ParseSignal(name); err == nil {
				out[i] = "--signal=" + name
			}
		}
	}
	return out
}
