// Package archtest keeps the structure of the module: who may import whom, and
// a few house rules that a compiler does not check.
package archtest
