// Package conformance runs the suites of the Host and Guest contracts on real
// gVisor capsules, through every hop: manager, its RPC twin, envd inside.
package conformance
