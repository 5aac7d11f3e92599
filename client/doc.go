// Package client is the Go SDK of Nestbox: capsules, their processes, files
// and ports, over the HTTP API.
//
//	c, err := client.New(client.FromEnv(os.Getenv))
//	capsule, err := c.Capsules.Create(ctx, nestbox.CapsuleSpec{})
//	defer capsule.Destroy(ctx)
//	cmd := capsule.Command("python3", "-m", "http.server", "8000")
//	cmd.Stdout = os.Stdout
//	err = cmd.Run()
//
// A process belongs to its capsule, not to the connection that started it:
// what reads its output here ([Cmd], [Stream], [Processes.Wait]) connects again
// by itself, from the byte it had reached, when the connection or the server
// goes away for a while. Output that is no longer kept by then is reported as
// a gap, never left out in silence, and an exit is always the one on record.
//
// Requests that only read are repeated when a connection fails. Requests that
// change something are repeated only if they surely did not reach the server.
//
// All types are safe for concurrent use unless they say otherwise. Errors of
// the API are [*Error]s, which wrap a *nestbox.Error, so that nestbox.CodeOf
// tells what went wrong.
//
// It may import the root package only, besides libraries.
package client
