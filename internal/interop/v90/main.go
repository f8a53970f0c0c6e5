// Program v90 is the stock program of package stock built with version 1.90.9 of
// the stock module.
package main

import "mesh/internal/interop/stock"

func main() { stock.Main() }
