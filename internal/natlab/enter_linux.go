package natlab

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// insideEnv marks the test binary that runs in its own namespaces.
const insideEnv = "MESH_NATLAB_INSIDE"

// missing says what keeps this machine from running a laboratory, or "".
func missing() string {
	if os.Getuid() != 0 {
		return "needs root"
	}
	for _, program := range []string{"ip", "nft", "conntrack", "mount"} {
		if _, err := exec.LookPath(program); err != nil {
			return "needs the program " + program
		}
	}
	return ""
}

// Main runs the tests inside namespaces of their own, and fails if they leave
// goroutines behind. Call it from TestMain, after actor.Perform.
func Main(m *testing.M) {
	if missing() != "" {
		os.Exit(m.Run()) // each test says why it skips
	}
	if os.Getenv(insideEnv) == "" {
		os.Exit(enter())
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "natlab: prepare the namespaces:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// enter runs the test binary again in namespaces of its own and returns its
// exit status.
func enter() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	signal.Ignore(os.Interrupt) // the child hears it as well
	if err := cmd.Run(); err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return e.ExitCode()
		}
		fmt.Fprintln(os.Stderr, "natlab: make namespaces:", err)
		return 1
	}
	return 0
}

// prepare gives the namespaces a place for their names, and the hosts a file of
// names that tests can write.
func prepare() error {
	hosts, err := os.CreateTemp("", "natlab-hosts")
	if err != nil {
		return err
	}
	hosts.Close()
	hostsFile = hosts.Name()
	return sh("", strings.Join([]string{
		"mount --make-rprivate /",
		"mkdir -p /run/netns",
		"mount -t tmpfs none /run/netns",
		"ip link set lo up",
		"mount --bind " + hostsFile + " /etc/hosts",
	}, "\n"))
}

// hostsFile is what the hosts read as /etc/hosts; set by prepare.
var hostsFile string

// sh runs a shell script in a namespace, "" being the test's own.
func sh(ns, script string) error {
	args := []string{"sh", "-e"}
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s\n%s", err, out, script)
	}
	return nil
}
