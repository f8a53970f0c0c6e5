// Package load is the half of the benchmark that runs in the measured processes:
// a program with some network stack calls Main, and is then told by lines of
// JSON on its standard input to make nodes, to move data between them and to
// say what that cost. It knows nothing of the stack but Node, so that each
// stack can be built in a module of its own, and depends on the standard library
// only, so that it brings nothing into any of them.
package load
