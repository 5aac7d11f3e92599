package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/client"
)

var update = flag.Bool("update", false, "write openapi.yaml anew")

// TestOpenAPI keeps openapi.yaml what the Go types say.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	got, err := newServer(Config{}).open.OpenAPI().YAML()
	require.NoError(t, err)
	if *update {
		require.NoError(t, os.WriteFile("openapi.yaml", got, 0o644))
		return
	}
	require.True(t, bytes.Equal(openAPI, got), "openapi.yaml is not what the Go types say; run: go generate ./internal/api")
}

// publicOperations need no key; the client needs no method for the last two.
var publicOperations = map[string]bool{"health": true, "ready": true, "getOpenAPI": true, "getDocs": true}

// TestEveryOperation walks the document: each operation says who may call it,
// what its errors look like, and how it is called.
func TestEveryOperation(t *testing.T) {
	t.Parallel()
	s := newServer(Config{})
	for _, op := range s.operations() {
		t.Run(op.OperationID, func(t *testing.T) {
			t.Parallel()
			require.NotEmpty(t, op.OperationID)
			require.NotEmpty(t, op.Summary)
			require.Len(t, op.Tags, 1)
			require.NotEmpty(t, sampleOf(op))
			if publicOperations[op.OperationID] {
				require.Empty(t, op.Security)
			} else {
				require.Equal(t, []map[string][]string{{schemeKey: {}}, {schemeBearer: {}}}, op.Security)
				require.Contains(t, op.Responses, "401")
			}
			require.Contains(t, op.Responses, "400")
			require.Contains(t, op.Responses, "500")
			for status, res := range op.Responses {
				checkResponse(t, op, status, res)
			}
			if op.RequestBody != nil {
				require.NotEmpty(t, op.RequestBody.Content)
			}
			for _, name := range pathParameters(op.Path) {
				require.True(t, hasParameter(op, name), "path parameter %s is not documented", name)
			}
		})
	}
}

// checkResponse looks at one documented answer.
func checkResponse(t *testing.T, op *huma.Operation, status string, res *huma.Response) {
	code, err := strconv.Atoi(status)
	require.NoError(t, err)
	require.NotEmpty(t, res.Description)
	content := res.Content["application/json"]
	if code >= http.StatusBadRequest {
		require.NotNil(t, content, status)
		require.Equal(t, "#/components/schemas/ErrorBody", content.Schema.Ref)
		example, ok := content.Example.(errorBody)
		require.True(t, ok)
		require.NotEmpty(t, example.Detail.Code, status)
		require.NotEmpty(t, example.Detail.Message, status)
		return
	}
	if content != nil {
		require.NotNil(t, content.Schema, "%s %s", op.OperationID, status)
		require.NotNil(t, content.Example, "%s %s", op.OperationID, status)
	}
}

func pathParameters(path string) []string {
	var names []string
	for part := range strings.SplitSeq(path, "/") {
		if name, ok := strings.CutPrefix(part, "{"); ok {
			names = append(names, strings.TrimSuffix(name, "}"))
		}
	}
	return names
}

func hasParameter(op *huma.Operation, name string) bool {
	for _, p := range op.Parameters {
		if p.In == "path" && p.Name == name && p.Required {
			return true
		}
	}
	return false
}

// TestClientHasEveryOperation holds the Go client and the document together.
func TestClientHasEveryOperation(t *testing.T) {
	t.Parallel()
	methods := clientMethods(t)
	known := map[string]bool{}
	for _, op := range newServer(Config{}).operations() {
		known[op.OperationID] = true
		if op.OperationID == "getOpenAPI" || op.OperationID == "getDocs" {
			continue
		}
		method := client.Operations[op.OperationID]
		require.NotEmpty(t, method, "client.Operations has no method for %s", op.OperationID)
		require.True(t, methods[method], "%s: the client package has no method %s", op.OperationID, method)
	}
	for id := range client.Operations {
		require.True(t, known[id], "client.Operations names %s, which is no operation", id)
	}
}

// clientMethods returns the exported methods of the client package, as Type.Method.
func clientMethods(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("../../client/*.go")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	found := map[string]bool{}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Recv == nil || !fn.Name.IsExported() {
				continue
			}
			recv := fn.Recv.List[0].Type
			if star, ok := recv.(*ast.StarExpr); ok {
				recv = star.X
			}
			if id, ok := recv.(*ast.Ident); ok {
				found[id.Name+"."+fn.Name.Name] = true
			}
		}
	}
	return found
}

// validBody returns a body that an operation takes, from its documented example.
func validBody(t *testing.T, op *huma.Operation) (body, contentType string) {
	t.Helper()
	if op.RequestBody == nil {
		return "", ""
	}
	if content := op.RequestBody.Content["application/json"]; content != nil {
		b, err := json.Marshal(content.Example)
		require.NoError(t, err)
		return string(b), "application/json"
	}
	if op.RequestBody.Content["multipart/form-data"] != nil {
		return form(field("path", "/x"), file("x")), formType
	}
	return "x", "application/octet-stream"
}
