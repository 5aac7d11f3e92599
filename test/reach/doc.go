// Package reach tests the way out of a capsule with the clients that people use, against
// what they really talk to: the archive and the registry that the host itself is set up
// for. It has tests only.
package reach
