package main

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestStatesDocIsFresh(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../../docs/states.md")
	require.NoError(t, err)
	require.Equal(t, render(nestbox.Transitions), string(doc), "docs/states.md is stale: run make generate")
}
