// Program minimal does the least that a user of the library does: its size is
// what the library adds to a program.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"mesh"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	l, err := mesh.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := mesh.Dial(context.Background(), "tcp", "peer:80")
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
}
