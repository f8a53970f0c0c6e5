// Package control is the node's side of coordination: it speaks the ts2021
// control protocol to one control server.
//
// A Client holds the one encrypted connection that all requests share, and
// dials it anew when it breaks. A Session keeps a node's map stream going for
// as long as the node lives, makes netmaps out of it, and tells the server what
// changes at the node.
package control
