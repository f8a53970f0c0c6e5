package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patienceOfTest is more than anything here takes.
const patienceOfTest = 2 * time.Minute

// build compiles the program.
func build(t *testing.T) string {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "quickstart.exe")
	if out, err := exec.Command("go", "build", "-o", exe, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return exe
}

// command runs the program with an empty home; what it leaves behind is in the
// second result.
func command(t *testing.T, exe string) (*exec.Cmd, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patienceOfTest)
	t.Cleanup(cancel)
	tmp, err := os.MkdirTemp("", "m") // short: there will be a unix socket in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = []string{"HOME=" + t.TempDir(), "TMPDIR=" + tmp, "TMP=" + tmp, "SYSTEMROOT=" + os.Getenv("SYSTEMROOT"),
		"MESH_CONTROL_URL=http://127.0.0.1:1"} // of no concern to the story
	return cmd, tmp
}

func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("it left behind: %v %v", left, err)
	}
}

func TestStory(t *testing.T) {
	cmd, tmp := command(t, build(t))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Fatalf("%v\n%s\n%s", err, out, stderr.Bytes())
	}
	text := string(out)
	for _, part := range []string{
		"ok       planner → database:5432",
		"database knows the caller as planner.mesh.internal (tag:planner, 100.64.0.",
		"let it in by acls[0] (line 4, policy 1)",
		"refused  image → database:5432",
		"not allowed by policy",
		"on a connection from before",
		"cut      the end at image",
		"cut      the end at database",
		"All of this was observed",
	} {
		if !strings.Contains(strings.Join(strings.Fields(text), " "), strings.Join(strings.Fields(part), " ")) {
			t.Errorf("the story lacks %q:\n%s", part, text)
		}
	}
	for _, line := range strings.Split(text, "\n") {
		if len([]rune(line)) > 100 {
			t.Errorf("a line of %d characters: %q", len([]rune(line)), line)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Error("colours in a pipe")
	}
	empty(t, tmp)
}

// However the parent ends, no child lives on.
func TestEarlyEnd(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no signals")
	}
	exe := build(t)
	for _, test := range []struct {
		name   string
		signal os.Signal
		code   int
	}{
		{"interrupted", os.Interrupt, 1},
		{"terminated", syscall.SIGTERM, 1},
		{"killed", os.Kill, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd, tmp := command(t, exe)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			stderr, theirs, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer stderr.Close()
			cmd.Stderr = theirs
			err = cmd.Start()
			theirs.Close()
			if err != nil {
				t.Fatal(err)
			}
			// The first agent is up, the others are not.
			lines := bufio.NewScanner(out)
			for lines.Scan() && !strings.HasPrefix(lines.Text(), "  database  pid ") {
			}
			if err := cmd.Process.Signal(test.signal); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() {
				if strings.Contains(lines.Text(), "All of this was observed") {
					t.Error("it says that it observed all")
				}
			}
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != test.code {
				t.Errorf("status %d, want %d", code, test.code)
			}
			// All children have its stderr: the end of that is the end of them.
			stderr.SetReadDeadline(time.Now().Add(patienceOfTest))
			if said, err := io.ReadAll(stderr); err != nil {
				t.Errorf("children live on: %v; they said %q", err, said)
			}
			if test.signal != os.Kill {
				empty(t, tmp)
			}
		})
	}
}
