package client

import (
	"testing"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/fieldtest"
)

// TestEveryFieldIsRead: a field that is added to a type of the product, or of
// the wire, and forgotten by the client fails here.
func TestEveryFieldIsRead(t *testing.T) {
	t.Parallel()
	fieldtest.Matters(t, func(b capsuleBody) any { return b.domain() })
	fieldtest.Matters(t, func(b networkLogBody) any { return b.domain() })
	fieldtest.Matters(t, func(b networkFlowBody) any { return networkLogBody{Recent: []networkFlowBody{b}}.domain() }, "networkFlowBody.Verdict")
	fieldtest.Matters(t, func(b processBody) any { return b.domain() })
	fieldtest.Matters(t, func(b entryBody) any { return b.domain() })
	fieldtest.Matters(t, func(b watchFrame) any { return b.domain() })
	fieldtest.Matters(t, func(b unpackedBody) any { return b.domain() })
	fieldtest.Matters(t, func(s nestbox.CapsuleSpec) any { return createBodyOf(s) },
		"CapsuleSpec.Image", "CapsuleSpec.Defaults.Env", "CapsuleSpec.Defaults.User", "CapsuleSpec.Defaults.Cwd", // of the template, which is asked for
		"CapsuleSpec.Defaults.Entrypoint", "CapsuleSpec.Defaults.Cmd", "CapsuleSpec.Defaults.Labels")
	fieldtest.Matters(t, func(s nestbox.ProcessSpec) any { return execBodyOf(s) }, "ProcessSpec.RequestKey") // a header
}
