// Package stock is a program around the open clients and servers that this
// project must get along with: "node" runs one stock tsnet node, "servers" the
// stock test control server, relay and STUN. Tests steer it line by line
// through standard input and output; package mesh/internal/interop is the other
// end.
//
// The package is a module of its own so that the root module links nothing of
// it. Modules v90 and v102 build it against one stock version each.
package stock
