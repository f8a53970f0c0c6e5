package pgserver

import "syscall"

// endWithParent has the kernel end a process as Stop does, when the thread that
// started it has ended. attr may be nil.
func endWithParent(attr *syscall.SysProcAttr) *syscall.SysProcAttr {
	a := new(syscall.SysProcAttr)
	if attr != nil {
		*a = *attr
	}
	a.Pdeathsig = syscall.SIGINT
	return a
}
