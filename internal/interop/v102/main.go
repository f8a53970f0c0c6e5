// Program v102 is the stock program of package stock built with version 1.102.5 of
// the stock module.
package main

import "mesh/internal/interop/stock"

func main() { stock.Main() }
