package interop

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

const (
	// stockEnv names the stock program; the modules v90 and v102 set it.
	stockEnv = "MESH_STOCK"
	// insideEnv marks the test binary that runs in its own namespace.
	insideEnv = "MESH_INTEROP_INSIDE"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(stockEnv) == "" || os.Getenv(insideEnv) != "":
		if os.Getenv(insideEnv) != "" {
			if err := network(); err != nil {
				fmt.Fprintln(os.Stderr, "interop: prepare the network namespace:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	default:
		os.Exit(enter())
	}
}

// enter runs the test binary again in a network namespace of its own and
// returns its exit status.
func enter() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	signal.Ignore(os.Interrupt) // the child hears it as well
	if err := cmd.Run(); err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return e.ExitCode()
		}
		fmt.Fprintf(os.Stderr, "interop: cannot make a network namespace (root or user namespaces are needed): %v\n", err)
		return 1
	}
	return 0
}

// network brings up loopback and a veth pair, whose far end is left alone: the
// stock client sees an interface, and nothing can leave.
func network() error {
	for _, line := range []string{
		"link set lo up",
		"link add veth0 type veth peer name veth1",
		"addr add 192.0.2.1/24 dev veth0",
		"addr add 2001:db8::1/64 dev veth0 nodad",
		"link set veth0 up",
		"link set veth1 up",
	} {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %v: %s", line, err, out)
		}
	}
	return nil
}
