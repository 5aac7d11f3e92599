// Package image makes and finds the root file systems that capsules start
// from. It is a leaf: it may import the root package and leaf packages only.
package image

// Root is a read-only root file system for a sandbox: an EROFS file, or a directory of
// the host, with other directories of the host shown, read-only, at places in it. All
// paths are absolute.
type Root struct {
	Image string // its name in the Store
	EROFS string // the file; "" = Dir is the base
	Dir   string // the base on the host
	Binds []Bind // over Dir, in the order in which they are to be mounted
	Upper string // a tar archive of what the writable layer begins with; "" = nothing
}

// Bind shows Source, a path of the host, at Target, an absolute path inside.
type Bind struct {
	Source string
	Target string
}
