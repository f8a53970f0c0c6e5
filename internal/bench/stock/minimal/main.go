// Program minimal does the least that a user of tsnet does: its size is what
// that library adds to a program.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"tailscale.com/tsnet"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	s := new(tsnet.Server)
	defer s.Close()
	l, err := s.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := s.Dial(context.Background(), "tcp", "peer:80")
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
}
