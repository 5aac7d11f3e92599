// Package hostile runs a whole server against capsules whose daemon is the
// enemy: silent, endless, lying, garbage. It measures what that costs the server
// in memory, descriptors, threads, goroutines and time. It has tests only.
package hostile
