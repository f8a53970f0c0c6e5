// Program stock is the other side of the benchmark: what users would take
// instead. `stock tsnet` are nodes of tsnet, with its test servers; `stock wg` are
// WireGuard devices over the stack that comes with them, without any servers.
package main

import (
	"fmt"
	"os"

	"mesh/internal/bench/load"
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "tsnet":
		load.Main(load.Stack{Node: newTsnet, Servers: newServers})
	case len(os.Args) == 2 && os.Args[1] == "wg":
		load.Main(load.Stack{Node: newDevice})
	}
	fmt.Fprintln(os.Stderr, "usage: stock tsnet|wg")
	os.Exit(2)
}
