// Package netmap holds what a node knows of its mesh: an immutable Map with its
// indexes, and the pure function that applies one message of the map stream to
// it. Whoever holds a Map may read it for as long as it likes, without locks;
// the next message makes a new Map that shares all that did not change.
package netmap
