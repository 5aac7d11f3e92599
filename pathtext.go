package nestbox

import (
	"strings"
	"unicode/utf8"
)

// A name in Linux is any bytes, but JSON and Protocol Buffers carry text only. The
// API shows a byte that is no UTF-8 as a character of a private range, and takes
// that character for the byte, so that what is listed can be read, written and
// removed, and is never taken for another file. See docs/adr/0018-names-that-are-no-text.md.
const (
	firstByteRune = 0x10FE80 // stands for the byte 0x80
	lastByteRune  = 0x10FEFF // stands for the byte 0xFF
	byteRuneBase  = 0x10FE00
	byteRuneStart = "\xf4\x8f" // with which all of them begin in UTF-8
)

// PathText returns a path, which may be any bytes, as text. Different paths have
// different texts: a character of the private range that is in the path itself is shown
// as the bytes that it is made of. PathBytes is its inverse.
func PathText(path string) string { return pathText(path, true) }

// TextOfPath returns text that is meant as a path, in which a byte that is no UTF-8
// may stand for itself.
func TextOfPath(text string) string { return pathText(text, false) }

func pathText(path string, exact bool) string {
	if utf8.ValidString(path) && !(exact && strings.Contains(path, byteRuneStart)) {
		return path
	}
	var b strings.Builder
	for len(path) > 0 {
		r, n := utf8.DecodeRuneInString(path)
		if r == utf8.RuneError && n == 1 || exact && isByteRune(r) {
			for _, c := range []byte(path[:n]) {
				b.WriteRune(byteRuneBase + rune(c))
			}
		} else {
			b.WriteString(path[:n])
		}
		path = path[n:]
	}
	return b.String()
}

// PathBytes returns the path that a text stands for.
func PathBytes(text string) string {
	if !strings.Contains(text, byteRuneStart) {
		return text
	}
	var b strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		if isByteRune(r) {
			b.WriteByte(byte(r - byteRuneBase))
		} else {
			b.WriteString(text[:n])
		}
		text = text[n:]
	}
	return b.String()
}

func isByteRune(r rune) bool { return r >= firstByteRune && r <= lastByteRune }
