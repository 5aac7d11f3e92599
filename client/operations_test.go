package client_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/client"
)

// TestOperationsAreMethods checks that each name in Operations is a method.
func TestOperationsAreMethods(t *testing.T) {
	t.Parallel()
	types := map[string]reflect.Type{
		"Client":    reflect.TypeFor[*client.Client](),
		"Capsules":  reflect.TypeFor[*client.Capsules](),
		"Capsule":   reflect.TypeFor[*client.Capsule](),
		"Cmd":       reflect.TypeFor[*client.Cmd](),
		"Processes": reflect.TypeFor[*client.Processes](),
		"Files":     reflect.TypeFor[*client.Files](),
		"Ports":     reflect.TypeFor[*client.Ports](),
	}
	for id, name := range client.Operations {
		typ, method, _ := strings.Cut(name, ".")
		require.Contains(t, types, typ, id)
		_, ok := types[typ].MethodByName(method)
		require.True(t, ok, "%s: there is no method %s", id, name)
	}
}
