// Package guesttest is the suite that every guest.Guest passes: envd itself,
// clients of it over one hop and more, and envd inside a sandbox. It sees what
// it tests through the interface only.
//
// It may import the root package and the contract only.
package guesttest
