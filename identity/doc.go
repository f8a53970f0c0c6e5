// Package identity says who is who on the mesh: the keys of machines and
// nodes, the proven identity of a peer, and the Store that keeps a node's own
// identity between runs.
package identity
