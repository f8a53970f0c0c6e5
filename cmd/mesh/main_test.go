package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// binary is the program, built once.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "mesh")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "mesh")
		if runtime.GOOS == "windows" {
			binary += ".exe"
		}
		if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		code := m.Run()
		if err := goleak.Find(); code == 0 && err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}())
}

// shortDir is a directory whose name leaves room for a unix socket in it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "policy.hujson")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// shell is a user's environment.
type shell struct {
	t   *testing.T
	env []string
}

// newShell has an empty home directory and nothing set.
func newShell(t *testing.T, env ...string) *shell {
	return &shell{t, append([]string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir()}, env...)}
}

// result is how a command ended.
type result struct {
	code           int
	stdout, stderr string
}

// run runs the program to its end.
func (s *shell) run(args ...string) result { return s.pipe("", args...) }

// pipe is run with standard input.
func (s *shell) pipe(stdin string, args ...string) result {
	s.t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(s.t.Context(), binary, args...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = s.env, strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("mesh %q: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// ok runs the program, which must succeed without a word on stderr, and returns
// what it printed.
func (s *shell) ok(args ...string) string {
	s.t.Helper()
	r := s.run(args...)
	if r.code != exitDone || r.stderr != "" {
		s.t.Fatalf("mesh %q: status %d, stderr %q", args, r.code, r.stderr)
	}
	return r.stdout
}

// fails runs the program, which must fail with one line that has the parts.
func (s *shell) fails(args []string, parts ...string) {
	s.t.Helper()
	checkFailure(s.t, s.run(args...), args, parts...)
}

func checkFailure(t *testing.T, r result, args []string, parts ...string) {
	t.Helper()
	if r.code != exitFail || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 || !strings.HasSuffix(r.stderr, "\n") {
		t.Fatalf("mesh %q: status %d, stdout %q, stderr %q; want 1 and one line on stderr", args, r.code, r.stdout, r.stderr)
	}
	for _, p := range parts {
		if !strings.Contains(r.stderr, p) {
			t.Errorf("mesh %q says %q; want %q in it", args, r.stderr, p)
		}
	}
}

// decode reads JSON that a command printed.
func decode[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return v
}

// process is a program that goes on running.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	exit chan struct{} // closed when it has ended

	mu    sync.Mutex // guards the fields below
	lines []string   // of stdout and stderr
	news  chan struct{}
}

// start starts the program; it is killed when the test ends, if it still runs.
func (s *shell) start(args ...string) *process {
	s.t.Helper()
	p := &process{t: s.t, cmd: exec.Command(binary, args...), exit: make(chan struct{}), news: make(chan struct{})}
	p.cmd.Env = s.env
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	var reading sync.WaitGroup
	for _, r := range []io.Reader{stdout, stderr} {
		reading.Go(func() { p.read(r) })
	}
	go func() {
		defer close(p.exit)
		reading.Wait()
		p.cmd.Wait()
	}()
	s.t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exit
	})
	return p
}

func (p *process) read(r io.Reader) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		p.mu.Lock()
		p.lines = append(p.lines, lines.Text())
		close(p.news)
		p.news = make(chan struct{})
		p.mu.Unlock()
	}
}

// line waits for a line that begins with prefix and returns what follows.
func (p *process) line(prefix string) string {
	p.t.Helper()
	late := time.After(patience)
	for next := 0; ; {
		p.mu.Lock()
		lines, news := p.lines, p.news
		p.mu.Unlock()
		for ; next < len(lines); next++ {
			if rest, ok := strings.CutPrefix(lines[next], prefix); ok {
				return strings.TrimSpace(rest)
			}
		}
		select {
		case <-news:
		case <-p.exit:
			p.t.Fatalf("it ended without saying %q: %q", prefix, p.said())
		case <-late:
			p.t.Fatalf("it did not say %q in %v: %q", prefix, patience, p.said())
		}
	}
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// end waits for the end and returns the exit status, -1 for a signal.
func (p *process) end() int {
	p.t.Helper()
	select {
	case <-p.exit:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		p.t.Fatalf("it still runs after %v: %q", patience, p.said())
		return 0
	}
}

// terminate asks it to end and expects a clean end.
func (p *process) terminate() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	if code := p.end(); code != exitDone {
		p.t.Fatalf("status %d after SIGTERM: %q", code, p.said())
	}
}

// kill ends it at once.
func (p *process) kill() {
	p.t.Helper()
	p.cmd.Process.Kill()
	p.end()
}

// server is a running `mesh serve`.
type server struct {
	*process
	*shell
	data, url, addr, key string
	args                 []string
}

// startServer starts a server on free ports. Its shell has MESH_DATA set.
func startServer(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{data: filepath.Join(shortDir(t), "data"), args: args}
	s.shell = newShell(t, "MESH_DATA="+s.data)
	s.listen("127.0.0.1:0")
	return s
}

// listen runs the server, again if it ended.
func (s *server) listen(addr string) {
	s.shell.t.Helper()
	s.process = s.start(append([]string{"serve", "--listen", addr, "--stun", "127.0.0.1:0"}, s.args...)...)
	s.url, s.key = s.line("url "), s.line("key ")
	s.addr = strings.TrimPrefix(s.url, "http://")
	s.line("ready")
}

// until runs the program until what it prints is good.
func (s *shell) until(what string, good func(string) bool, args ...string) {
	s.t.Helper()
	late := time.After(patience)
	for {
		out := s.ok(args...)
		if good(out) {
			return
		}
		select {
		case <-late:
			s.t.Fatalf("waited %v for %s: %q", patience, what, out)
		default: // starting the program takes long enough
		}
	}
}
