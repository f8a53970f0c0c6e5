//go:build !unix

package pgserver

import "syscall"

// unprivileged has nothing to do where the server drops rights by itself.
func unprivileged(string) (*syscall.SysProcAttr, error) { return nil, nil }
