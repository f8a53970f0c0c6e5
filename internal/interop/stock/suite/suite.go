// Package suite runs the interoperation tests of the root module against the
// stock version that the calling module builds.
package suite

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Run builds the program in the current directory and runs the tests of
// mesh/internal/interop, which is the directory above, with it. The flags -v,
// -short, -race and -failfast of the calling test apply.
func Run(t *testing.T) { run(t, os.Getenv("MESH_INTEROP_RUN"), ".") }

// RunGrid compares where stock clients and nodes of ours find direct paths, in
// the laboratory of mesh/internal/natlab.
func RunGrid(t *testing.T) { run(t, "TestGridBesideStock", "../natlab") }

func run(t *testing.T, tests, folder string) {
	if runtime.GOOS != "linux" {
		t.Skip("needs network namespaces of Linux")
	}
	program := filepath.Join(t.TempDir(), "stock")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the stock program: %v\n%s", err, out)
	}
	args := []string{"test", "-count=1", "-timeout=25m"}
	if testing.Verbose() {
		args = append(args, "-v")
	}
	if testing.Short() {
		args = append(args, "-short")
	}
	if raceEnabled {
		args = append(args, "-race")
	}
	if tests != "" {
		args = append(args, "-run", tests)
	}
	if f := flag.Lookup("test.failfast"); f != nil && f.Value.String() == "true" {
		args = append(args, "-failfast")
	}
	cmd := exec.Command("go", append(args, folder)...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "MESH_STOCK="+program)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", folder, err)
	}
}
