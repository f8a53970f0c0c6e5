//go:build !linux

package main

import (
	"errors"
	"os/exec"
)

func isolate(*exec.Cmd)  {}
func together(*exec.Cmd) {}
func network() error     { return errors.New("needs network namespaces of Linux") }
func loopback(int) error { return errors.New("needs network namespaces of Linux") }
