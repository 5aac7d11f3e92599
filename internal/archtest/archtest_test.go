package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/nestbox/nestbox"

// rule says what packages may not import directly, or, with deep, through
// others either. Patterns are paths below the module; "x/..." is x and all
// below it, "" the root package, "std" the standard library.
type rule struct {
	name string
	of   []string
	but  []string // exempt from of
	not  []string
	deep bool
}

// compositionRoots put everything together, and may import everything.
var compositionRoots = []string{"cmd/...", "test/...", "bench/..."}

var rules = []rule{
	{
		name: "the root package imports the standard library only",
		of:   []string{""}, not: []string{"*"}, deep: true,
	},
	{
		name: "nobody imports cmd",
		of:   []string{"..."}, not: []string{"cmd/..."},
	},
	{
		name: "api and e2b go through control, never to the store, the host or the wire below",
		of:   []string{"internal/api", "internal/e2b/...", "internal/edge/..."},
		not:  []string{"internal/store/...", "internal/hostagent/...", "internal/sandbox/...", "gen/..."},
	},
	{
		name: "control knows neither its callers nor generated code, drivers or the guest's insides",
		of:   []string{"internal/control/..."},
		not:  []string{"internal/api/...", "internal/edge/...", "internal/cli/...", "gen/...", "internal/sandbox/gvisor/...", "internal/sandbox/fake/...", "internal/guest/envd/..."},
	},
	{
		name: "the host agent knows no concrete driver, no store and no control plane",
		of:   []string{"internal/hostagent/..."},
		not:  []string{"internal/sandbox/gvisor/...", "internal/sandbox/fake/...", "internal/store/...", "internal/control/...", "internal/api/..."},
		deep: true,
	},
	{
		name: "gVisor's driver does not know the fake one",
		of:   []string{"internal/sandbox/gvisor/..."}, not: []string{"internal/sandbox/fake/..."}, deep: true,
	},
	{
		name: "the fake driver does not know gVisor's",
		of:   []string{"internal/sandbox/fake/..."}, not: []string{"internal/sandbox/gvisor/..."}, deep: true,
	},
	{
		name: "gVisor is linked in one place",
		of:   []string{"..."}, but: []string{"internal/sandbox/gvisor/runsc"}, not: []string{"gvisor.dev/gvisor/..."},
	},
	{
		name: "only what carries a contract over the wire sees generated types",
		of:   []string{"..."},
		but:  []string{"gen/...", "internal/guest/guestrpc", "internal/hostagent/hostrpc", "internal/rpcerr", "internal/guest/e2bwire/..."},
		not:  []string{"gen/..."},
	},
	{
		name: "the client and the commands use the public API alone",
		of:   []string{"client/...", "internal/cli/...", "internal/demo/..."},
		not:  []string{"internal/api/...", "internal/control/...", "internal/store/...", "internal/hostagent/...", "internal/guest/...", "internal/sandbox/...", "gen/..."},
		deep: true,
	},
	{
		name: "envd stays small: no control plane, store or driver in it",
		of:   []string{"cmd/envd", "internal/guest/..."},
		not:  []string{"internal/control/...", "internal/store/...", "internal/hostagent/...", "internal/sandbox/gvisor/...", "internal/api/...", "gvisor.dev/gvisor/..."},
		deep: true,
	},
	{
		name: "the output log knows no process and no wire",
		of:   []string{"internal/guest/outputlog"}, not: []string{"internal/guest/envd/...", "internal/guest/guestrpc/...", "gen/..."}, deep: true,
	},
	{
		name: "leaves import the root package and other leaves only",
		of:   []string{"internal/image/...", "internal/netns/...", "internal/cgroup/...", "internal/pidfd/...", "internal/envdbin/...", "internal/config/...", "internal/durable/...", "internal/doctor", "internal/fieldtest/...", "internal/door/...", "internal/reserve", "internal/egress/...", "internal/archive", "internal/pseudofs", "internal/splice", "internal/forward", "internal/certfile"},
		not:  []string{"internal/api/...", "internal/control/...", "internal/store/...", "internal/hostagent/...", "internal/guest/...", "internal/sandbox/...", "client/...", "gen/..."},
		deep: true,
	},
}

type pkg struct {
	ImportPath string
	Name       string
	Dir        string
	Doc        string
	Standard   bool
	Imports    []string
	Deps       []string
	GoFiles    []string
}

func TestImports(t *testing.T) {
	t.Parallel()
	pkgs := list(t)
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			applies := false
			for _, p := range pkgs {
				path := below(p.ImportPath)
				if !matchAny(r.of, path) || matchAny(r.but, path) {
					continue
				}
				applies = true
				imports := p.Imports
				if r.deep {
					imports = p.Deps
				}
				for _, i := range imports {
					if matchAny(r.not, below(i)) && !(path == "" && standard(i)) {
						t.Errorf("%s imports %s", p.ImportPath, i)
					}
				}
			}
			require.True(t, applies, "no package is bound by this rule: has one been renamed?")
		})
	}
}

// below returns the path of a package below the module, or its whole path if
// it is of another.
func below(path string) string {
	if path == module {
		return ""
	}
	if rest, ok := strings.CutPrefix(path, module+"/"); ok {
		return rest
	}
	return path
}

func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

func matchAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, path) })
}

func match(pattern, path string) bool {
	switch {
	case pattern == "*" || pattern == "...":
		return true
	case strings.HasSuffix(pattern, "/..."):
		root := strings.TrimSuffix(pattern, "/...")
		return path == root || strings.HasPrefix(path, root+"/")
	default:
		return path == pattern
	}
}

// list returns the packages of the module, without their tests.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Dir,Doc,Standard,Imports,Deps,GoFiles", "./...")
	cmd.Dir = root(t)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		require.NoError(t, err)
		pkgs = append(pkgs, p)
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	require.NoError(t, err)
	return dir
}
