package netstack

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestSandbox shows what the defaults of Limits are said to hold: the process in
// which TestDeafReceivers runs, where connections are as full as they may be,
// gets along with 128 MB when the runtime is told of the limit.
func TestSandbox(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector takes more")
	}
	const inside = "MESH_NETSTACK_SANDBOX"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^(TestDeafReceivers|TestSandbox)$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1", "GOMEMLIMIT=100MiB")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v:\n%s", err, out)
		}
		return
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "VmHWM:" {
			if kb, err := strconv.Atoi(f[1]); err != nil || kb > 128_000 {
				t.Errorf("the process took up to %s KB", f[1])
			} else {
				t.Logf("the process took up to %d KB", kb)
			}
		}
	}
}
