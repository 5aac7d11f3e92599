//go:build !embed_envd

package envdbin

var embedded []byte
