// Package work does what people do with capsules in a day: real projects of npm, Python
// and Java are copied in and run, real servers are stopped while they are busy, a
// database is reached through a forwarded port, and a real browser works on a
// development server. All of it goes through the built binary and the public API.
//
// It needs root, and the programs that `make test` installs.
package work
