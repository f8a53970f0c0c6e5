package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// isolate gives a command a network namespace of its own.
func isolate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
}

// together makes a command end with this process.
func together(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

// network brings up loopback and an interface that leads nowhere: tsnet wants
// to see one.
func network() error {
	for _, line := range []string{
		fmt.Sprint("link set lo up mtu ", loopbackMTU),
		"link add veth0 type veth peer name veth1",
		"addr add 192.0.2.1/24 dev veth0",
		"link set veth0 up",
		"link set veth1 up",
	} {
		if err := ip(line); err != nil {
			return err
		}
	}
	return nil
}

// loopback sets how large the packets of loopback may be, which all traffic takes.
func loopback(mtu int) error { return ip(fmt.Sprint("link set lo mtu ", mtu)) }

func ip(line string) error {
	if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %v: %s", line, err, out)
	}
	return nil
}
