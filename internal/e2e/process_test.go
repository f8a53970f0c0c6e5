package e2e

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

	"go.uber.org/goleak"

	"mesh/internal/meshtest"
)

// Tests that need several operating-system processes start this test binary
// again with roleEnv set. A process gets its configuration as the first line of
// its standard input and answers with one line when it is ready; after that
// each line in is a request and each line out an answer, all of them JSON. It
// ends when its standard input does, and fails if it leaves goroutines behind.
const roleEnv = "MESH_TEST_ROLE"

// full tells whether the long forms of tests run, as in .ci/full.
func full() bool { return os.Getenv("MESH_FULL") == "1" }

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

// TestProcessRole is not a test of its own: in a process that another test has
// started it plays that process's role.
func TestProcessRole(t *testing.T) {
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

// process is this test binary, started again in a role.
type process struct {
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

// startProcess starts a process in a role and waits until it is ready; ready
// gets what it said then. The process ends with the test at the latest.
func startProcess(t testing.TB, role, name string, config, ready any) *process {
	t.Helper()
	p := &process{
		t:       t,
		name:    name,
		cmd:     exec.Command(os.Args[0], "-test.run=^TestProcessRole$"),
		done:    make(chan struct{}),
		next:    1,
		waiting: map[int]chan answer{},
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
	t.Cleanup(p.kill)
	if err := json.NewEncoder(in).Encode(config); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	if err := p.take(ctx, first, ready); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	return p
}

type stderrOf struct{ p *process }

func (w stderrOf) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	w.p.stderr = append(w.p.stderr, b[:min(len(b), 64<<10-len(w.p.stderr))]...)
	return len(b), nil
}

// read hands answers to those who wait for them until the process ends.
func (p *process) read(out io.Reader) {
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

func (p *process) await(id int) chan answer {
	ch := make(chan answer, 1)
	p.mu.Lock()
	p.waiting[id] = ch
	p.mu.Unlock()
	return ch
}

// take waits for an answer.
func (p *process) take(ctx context.Context, ch chan answer, result any) error {
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
func (p *process) ended() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("process %s ended: %v: %s", p.name, p.exit, p.stderr)
}

// call makes the process do something and waits for the answer. Calls run
// beside each other.
func (p *process) call(ctx context.Context, do string, args, result any) error {
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

// must is call for what has to work, soon.
func (p *process) must(do string, args, result any) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), meshtest.Patience)
	defer cancel()
	if err := p.call(ctx, do, args, result); err != nil {
		p.t.Fatal(err)
	}
}

// kill ends the process as a crash would, SIGKILL, and waits for that.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
	p.in.Close()
}

// stop lets the process close what it has and end; it must do so cleanly.
func (p *process) stop() {
	p.t.Helper()
	p.in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), meshtest.Patience)
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
		p.kill()
	}
}
