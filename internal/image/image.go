// Package image makes and finds the root file systems that capsules start
// from. It is a leaf: it may import the root package and leaf packages only.
package image

// Root is a read-only root file system for a sandbox: a directory of the host,
// with other directories of the host shown, read-only, at places in it.
type Root struct {
	Image string // its name in the Store
	Dir   string // absolute path of the base on the host
	Binds []Bind // in the order in which they are to be mounted
}

// Bind shows Source, a path of the host, at Target, an absolute path inside.
type Bind struct {
	Source string
	Target string
}
