package actor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Patience is how long a process may take for what must work soon.
const Patience = 60 * time.Second

// roleEnv names the role of a process that Start started.
const roleEnv = "MESH_TEST_ROLE"

type request struct {
	ID   int             `json:"id"`
	Do   string          `json:"do"`
	Args json.RawMessage `json:"args,omitempty"`
}

type answer struct {
	ID     int             `json:"id"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// part is what a process does in its role.
type part struct {
	ready    any // sent when the role has started
	commands map[string]func(args json.RawMessage) (any, error)
	close    func() error
}

var roles = map[string]func(config json.RawMessage) (*part, error){
	"control": playControl,
	"relay":   playRelay,
	"node":    playNode,
}

// Perform plays the role of a process that Start started, and ends the
// process. In any other process it does nothing. Call it first in TestMain.
func Perform() {
	play, ok := roles[os.Getenv(roleEnv)]
	if !ok {
		return
	}
	if err := perform(play, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func perform(play func(json.RawMessage) (*part, error), stdin io.Reader, stdout io.Writer) error {
	in := json.NewDecoder(bufio.NewReader(stdin))
	var mu sync.Mutex // guards out
	out := json.NewEncoder(stdout)
	reply := func(id int, result any, err error) {
		a := answer{ID: id}
		if err == nil {
			a.Result, err = json.Marshal(result)
		}
		if err != nil {
			a.Error = err.Error()
		}
		mu.Lock()
		defer mu.Unlock()
		// A parent that has gone closes our standard input too.
		_ = out.Encode(a)
	}
	var config json.RawMessage
	if err := in.Decode(&config); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	p, err := play(config)
	if err != nil {
		return err
	}
	reply(0, p.ready, nil)
	var wg sync.WaitGroup
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			break
		}
		wg.Go(func() {
			do, ok := p.commands[r.Do]
			if !ok {
				reply(r.ID, nil, fmt.Errorf("no command %q", r.Do))
				return
			}
			result, err := do(r.Args)
			reply(r.ID, result, err)
		})
	}
	err = p.close()
	wg.Wait()
	return errors.Join(err, goleak.Find())
}

// Process is the test binary, started again in a role.
type Process struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan struct{} // closed when the process has ended

	mu      sync.Mutex // guards the fields below
	next    int
	waiting map[int]chan answer
	stderr  []byte // the beginning of what it said
	exit    error  // set before done is closed
}

// Start starts a process in a role and waits until it is ready; ready gets what
// it said then, unless it is nil. The process ends with the test at the latest.
// wrap is a command that the process is started by, `ip netns exec NAME`.
func Start(t testing.TB, role, name string, config, ready any, wrap ...string) *Process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{
		t:       t,
		name:    name,
		cmd:     exec.Command(self, "-test.run=^$"),
		done:    make(chan struct{}),
		next:    1,
		waiting: map[int]chan answer{},
	}
	if len(wrap) > 0 {
		p.cmd = exec.Command(wrap[0], append(wrap[1:], p.cmd.Args...)...)
	}
	p.cmd.Env = append(os.Environ(), roleEnv+"="+role)
	p.cmd.Stderr = stderrOf{p}
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first := p.await(0)
	go p.read(out)
	t.Cleanup(p.Kill)
	if err := json.NewEncoder(in).Encode(config); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	if err := p.take(ctx, first, ready); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	return p
}

type stderrOf struct{ p *Process }

func (w stderrOf) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	w.p.stderr = append(w.p.stderr, b[:min(len(b), 64<<10-len(w.p.stderr))]...)
	return len(b), nil
}

// read hands answers to those who wait for them until the process ends.
func (p *Process) read(out io.Reader) {
	in := json.NewDecoder(bufio.NewReader(out))
	for {
		var a answer
		if in.Decode(&a) != nil {
			break
		}
		p.mu.Lock()
		ch := p.waiting[a.ID]
		delete(p.waiting, a.ID)
		p.mu.Unlock()
		if ch != nil {
			ch <- a
		}
	}
	io.Copy(io.Discard, out)
	err := p.cmd.Wait()
	p.mu.Lock()
	p.exit = err
	p.mu.Unlock()
	close(p.done)
}

func (p *Process) await(id int) chan answer {
	ch := make(chan answer, 1)
	p.mu.Lock()
	p.waiting[id] = ch
	p.mu.Unlock()
	return ch
}

// take waits for an answer.
func (p *Process) take(ctx context.Context, ch chan answer, result any) error {
	var a answer
	select {
	case a = <-ch:
	case <-p.done:
		return p.ended()
	case <-ctx.Done():
		return ctx.Err()
	}
	if a.Error != "" {
		return errors.New(a.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(a.Result, result)
}

// ended says how the process ended.
func (p *Process) ended() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("process %s ended: %v: %s", p.name, p.exit, p.stderr)
}

// Call makes the process do something and waits for the answer. Calls run
// beside each other.
func (p *Process) Call(ctx context.Context, do string, args, result any) error {
	r := request{Do: do}
	var err error
	if r.Args, err = json.Marshal(args); err != nil {
		return err
	}
	p.mu.Lock()
	r.ID = p.next
	p.next++
	ch := make(chan answer, 1)
	p.waiting[r.ID] = ch
	err = json.NewEncoder(p.in).Encode(r)
	p.mu.Unlock()
	if err != nil {
		select {
		case <-p.done:
			return p.ended()
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	if err := p.take(ctx, ch, result); err != nil {
		return fmt.Errorf("%s: %s: %w", p.name, do, err)
	}
	return nil
}

// Must is Call for what has to work, soon.
func (p *Process) Must(do string, args, result any) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), Patience)
	defer cancel()
	if err := p.Call(ctx, do, args, result); err != nil {
		p.t.Fatal(err)
	}
}

// Name returns the name that the process was started with.
func (p *Process) Name() string { return p.name }

// T returns the test that started the process.
func (p *Process) T() testing.TB { return p.t }

// Signal sends a signal to the process.
func (p *Process) Signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

// Kill ends the process as a crash would, SIGKILL, and waits for that.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
	p.in.Close()
}

// Stop lets the process close what it has and end; it must do so cleanly.
func (p *Process) Stop() {
	p.t.Helper()
	p.in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	select {
	case <-p.done:
		p.mu.Lock()
		exit := p.exit
		p.mu.Unlock()
		if exit != nil {
			p.t.Error(p.ended())
		}
	case <-ctx.Done():
		p.t.Errorf("%s does not end", p.name)
		p.Kill()
	}
}
