// Package e2e tests Nestbox as its users meet it: the built binary, real gVisor
// capsules and plain HTTP, with the server killed, readers cut and capsules
// broken along the way. It imports the client at most, nothing of internal/
// but what makes binaries and certificates for tests.
package e2e
