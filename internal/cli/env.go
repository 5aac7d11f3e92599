package cli

import (
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/nestbox/nestbox"
)

// envFlags say what is in an environment.
type envFlags struct{ vars, files []string }

func (e *envFlags) add(fl *pflag.FlagSet) {
	fl.StringArrayVarP(&e.vars, "env", "e", nil, "environment variable: K=V, or K for its value here, if it has one")
	fl.StringArrayVar(&e.files, "env-file", nil, "file of environment variables, one in a line as for -e, and of # comments")
}

// read returns the variables. lookup finds the values of those that are here.
func (e envFlags) read(lookup func(string) (string, bool)) (map[string]string, error) {
	var vars []string
	for _, name := range e.files {
		lines, err := readEnvFile(name)
		if err != nil {
			return nil, err
		}
		vars = append(vars, lines...)
	}
	env := map[string]string{}
	for _, kv := range append(vars, e.vars...) {
		k, v, given := strings.Cut(kv, "=")
		if !given {
			if v, given = lookup(k); !given {
				continue
			}
		}
		env[k] = v
	}
	return env, nil
}

// maxEnvFile is how long a file of variables may be, in bytes: all of them together
// may not be longer.
const maxEnvFile = nestbox.MaxSpecBytes

// readEnvFile reads the variables of a file as docker does: a line is what -e takes,
// quotes mean nothing, and lines that begin with # are comments.
func readEnvFile(name string) ([]string, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxEnvFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxEnvFile {
		return nil, nestbox.Errorf(nestbox.CodeTooLarge, "%s is longer than %d bytes", name, maxEnvFile)
	}
	var vars []string
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(text), "\uFEFF")) {
		n++
		line = strings.TrimLeft(strings.TrimRight(line, "\r\n"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		if k, _, _ := strings.Cut(line, "="); k == "" || strings.ContainsAny(k, " \t") {
			return nil, nestbox.Errorf(nestbox.CodeInvalid, "%s, line %d: %.80q is no name of a variable", name, n, k)
		}
		vars = append(vars, line)
	}
	return vars, nil
}
