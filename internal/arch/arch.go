// Package arch holds the rules of the source tree as tests: which package may
// import which, what an embedding program links, how long a file may be.
package arch
