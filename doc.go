// Package nestbox is the language of the product: capsules, processes, files,
// hosts and keys, their states, their validation and their error codes.
//
// It imports the standard library only, does no I/O and starts no goroutines,
// so that every other package can speak it.
package nestbox

// Version is the version of this source tree.
const Version = "0.1.0"
