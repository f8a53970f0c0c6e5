package interop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"mesh/internal/meshtest"
)

// process is a running stock program.
type process struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	log    string        // file with what it wrote to standard error
	ended  chan struct{} // closed when standard output ended
	exited sync.WaitGroup

	mu      sync.Mutex
	nextID  int64                        // guarded by mu
	calls   map[int64]chan reply         // guarded by mu
	events  map[string][]json.RawMessage // guarded by mu; all so far, by name
	changed chan struct{}                // guarded by mu; closed at the next event
}

type reply struct {
	ID     int64
	Error  string
	Result json.RawMessage
	Event  string
}

// startStock runs the stock program until the test ends. env are additional
// variables, "TS_DEBUG_ALWAYS_USE_DERP=1".
func startStock(t testing.TB, name string, env []string, args ...string) *process {
	t.Helper()
	program := os.Getenv(stockEnv)
	if program == "" {
		t.Skip("no stock program: run `go test` in internal/interop/v102 or v90")
	}
	p := &process{
		t: t, name: name,
		cmd:     exec.Command(program, args...),
		log:     filepath.Join(logDir(t), name+".log"),
		ended:   make(chan struct{}),
		calls:   make(map[int64]chan reply),
		events:  make(map[string][]json.RawMessage),
		changed: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), "TS_NO_LOGS_NO_SUPPORT=true", "HOME="+t.TempDir())
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.cmd.Stderr = log
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	p.exited.Go(func() { p.read(stdout) })
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, tail(p.log, 12000))
		}
	})
	return p
}

// logDir is where a test's stock programs write their logs: a temporary
// directory, or one in $MESH_INTEROP_LOGS that stays.
func logDir(t testing.TB) string {
	keep := os.Getenv("MESH_INTEROP_LOGS")
	if keep == "" {
		return t.TempDir()
	}
	dir := filepath.Join(keep, t.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func tail(file string, n int) []byte {
	b, _ := os.ReadFile(file)
	return b[max(0, len(b)-n):]
}

// logged counts a text in the lines that the process wrote to its log.
func (p *process) logged(text string) int {
	b, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	return bytes.Count(b, []byte(text))
}

func (p *process) read(stdout io.Reader) {
	defer close(p.ended)
	in := bufio.NewScanner(stdout)
	in.Buffer(nil, 1<<24)
	for in.Scan() {
		var r reply
		if json.Unmarshal(in.Bytes(), &r) != nil {
			continue // some library's chatter
		}
		p.mu.Lock()
		if r.Event != "" {
			p.events[r.Event] = append(p.events[r.Event], r.Result)
			close(p.changed)
			p.changed = make(chan struct{})
		} else if c := p.calls[r.ID]; c != nil {
			delete(p.calls, r.ID)
			c <- r
		}
		p.mu.Unlock()
	}
}

// stop ends the process in an orderly way.
func (p *process) stop() {
	p.stdin.Close()
	// Stock clients have been seen to hang at their end.
	hung := time.AfterFunc(15*time.Second, func() { p.cmd.Process.Kill() })
	defer hung.Stop()
	p.exited.Wait()
	p.cmd.Wait()
}

// kill ends the process at once.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.stop()
}

// try asks the process to do something and decodes its answer into result,
// unless that is nil.
func (p *process) try(op string, args, result any) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), 3*meshtest.Patience)
	defer cancel()
	raw, err := json.Marshal(args)
	if err != nil {
		return err
	}
	answer := make(chan reply, 1)
	p.mu.Lock()
	p.nextID++
	id := p.nextID
	p.calls[id] = answer
	line, _ := json.Marshal(map[string]any{"ID": id, "Op": op, "Args": json.RawMessage(raw)})
	_, err = p.stdin.Write(append(line, '\n'))
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %s: %w", p.name, op, err)
	}
	select {
	case r := <-answer:
		if r.Error != "" {
			return errors.New(r.Error)
		}
		if result == nil || len(r.Result) == 0 {
			return nil
		}
		return json.Unmarshal(r.Result, result)
	case <-p.ended:
		return fmt.Errorf("%s: %s: the process ended", p.name, op)
	case <-ctx.Done():
		return fmt.Errorf("%s: %s: %w", p.name, op, ctx.Err())
	}
}

// do is try, and the test fails when it does.
func (p *process) do(op string, args, result any) {
	p.t.Helper()
	if err := p.try(op, args, result); err != nil {
		p.t.Fatalf("%s: %s %v: %v", p.name, op, args, err)
	}
}

// event waits for the n-th event of that name, counted from 1, and returns it.
func (p *process) event(name string, n int) json.RawMessage {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), meshtest.Patience)
	defer cancel()
	for {
		p.mu.Lock()
		all, changed := p.events[name], p.changed
		p.mu.Unlock()
		if len(all) >= n {
			return all[n-1]
		}
		select {
		case <-changed:
		case <-p.ended:
			p.t.Fatalf("%s ended before event %s", p.name, name)
		case <-ctx.Done():
			p.t.Fatalf("%s: no event %s", p.name, name)
		}
	}
}

// said reports whether there was an event with that text.
func (p *process) said(name, text string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, raw := range p.events[name] {
		var got string
		if json.Unmarshal(raw, &got) == nil && got == text {
			return true
		}
	}
	return false
}
