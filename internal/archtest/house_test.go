package archtest

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// maxLines is how long a file may be before it holds more than one noun.
const maxLines = 700

var (
	vagueNames = []string{"util", "utils", "common", "models", "types", "shared", "helpers", "misc"}
	generated  = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)
	todo       = regexp.MustCompile(`context\.TODO\(`)
	sleep      = regexp.MustCompile(`time\.Sleep\(`)
	assertion  = regexp.MustCompile(`"github\.com/stretchr/testify/assert"`)
)

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if match("gen/...", below(p.ImportPath)) || len(p.GoFiles) == 0 {
			continue
		}
		require.NotEmpty(t, p.Doc, "%s has no package comment", p.ImportPath)
		require.NotContains(t, vagueNames, p.Name, "%s is named for nothing", p.ImportPath)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	seen := 0
	eachGoFile(t, func(path string, data []byte) {
		seen++
		lines := bytes.Count(data, []byte("\n"))
		require.LessOrEqual(t, lines, maxLines, "%s is too long: split it by noun", path)
		if path == filepath.Join("internal", "archtest", "house_test.go") {
			return // it names what it looks for
		}
		require.False(t, todo.Match(data), "%s uses context.TODO", path)
		require.False(t, assertion.Match(data), "%s asserts and goes on: require", path)
		// In a synctest bubble a sleep takes no time and wakes exactly then.
		if strings.HasSuffix(path, "_test.go") && !bytes.Contains(data, []byte(`"testing/synctest"`)) {
			require.False(t, sleep.Match(data), "%s sleeps: wait for something that happens", path)
		}
	})
	require.Greater(t, seen, 100)
}

// TestNoHiddenStarts finds init functions: nothing happens because a package
// was imported.
func TestNoHiddenStarts(t *testing.T) {
	t.Parallel()
	eachGoFile(t, func(path string, data []byte) {
		file, err := parser.ParseFile(token.NewFileSet(), path, data, 0)
		require.NoError(t, err)
		require.Nil(t, file.Scope.Lookup("init"), "%s has an init function", path)
	})
}

// eachGoFile calls f with every Go file that is written by hand.
func eachGoFile(t *testing.T, f func(path string, data []byte)) {
	t.Helper()
	top := root(t)
	err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, p)
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", "bin", "gen", "node_modules"}, d.Name()) {
			return filepath.SkipDir
		}
		if d.IsDir() || filepath.Ext(p) != ".go" {
			return nil
		}
		data, err := os.ReadFile(p)
		if err != nil || generated.Match(data) {
			return err
		}
		f(rel, data)
		return nil
	})
	require.NoError(t, err)
}
