//go:build !linux

package pgserver

import "syscall"

// endWithParent changes nothing where a kernel cannot end a process with another.
func endWithParent(attr *syscall.SysProcAttr) *syscall.SysProcAttr { return attr }
