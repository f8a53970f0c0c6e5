package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The parent gives orders on a child's standard input, one JSON value a line,
// and the child reports on its standard output. End of input ends the child, so
// no child outlives the parent, however that dies.

// order is what the parent asks an agent to do.
type order struct {
	Do   string `json:"do"`
	Addr string `json:"addr,omitempty"` // "database:5432"
	Say  string `json:"say,omitempty"`  // a line, or the path of a URL
	Conn string `json:"conn,omitempty"` // name of a connection that stays open
}

// What there is to do.
const (
	doAsk  = "ask"  // connect, say a line, read the answer
	doGet  = "get"  // the same over HTTP
	doOpen = "open" // connect and keep the connection
	doSay  = "say"  // use it
)

// event is what a child reports.
type event struct {
	Event  string        `json:"event"`
	URL    string        `json:"url,omitempty"`
	Key    string        `json:"key,omitempty"`
	Socket string        `json:"socket,omitempty"`
	Addr   string        `json:"addr,omitempty"`
	Peer   string        `json:"peer,omitempty"`
	Tags   []string      `json:"tags,omitempty"`
	Rule   string        `json:"rule,omitempty"`
	Answer string        `json:"answer,omitempty"`
	Path   string        `json:"path,omitempty"`
	Took   time.Duration `json:"took,omitempty"`
	Error  string        `json:"error,omitempty"`
	Kind   string        `json:"kind,omitempty"`

	at time.Time // when the parent heard of it
}

// What there is to report.
const (
	evReady  = "ready"
	evResult = "result" // of an order
	evServed = "served" // a caller was let in
	evEnded  = "ended"  // a connection broke
	evFailed = "failed" // the child cannot go on
)

// reporter is the child's side of the events.
type reporter struct {
	mu  sync.Mutex // guards enc
	enc *json.Encoder
}

func (r *reporter) send(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.enc.Encode(e)
}

// fromParent connects a child to its parent. The context ends and orders is closed
// when the parent is done, or dead.
func fromParent() (context.Context, <-chan order, *reporter) {
	// The parent decides when to end, also when a terminal interrupts all.
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	orders := make(chan order)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(orders)
		defer cancel()
		lines := json.NewDecoder(os.Stdin)
		for {
			var o order
			if lines.Decode(&o) != nil {
				return
			}
			orders <- o
		}
	}()
	return ctx, orders, &reporter{enc: json.NewEncoder(os.Stdout)}
}

// process is the parent's side of a child.
type process struct {
	role  string
	cmd   *exec.Cmd
	in    *json.Encoder
	close func() error // of the child's input
	first event        // what it reported when it was ready

	ready, result, served, ended chan event
	failure                      event         // set before dead is closed
	dead                         chan struct{} // closed when it will report no more
}

// startChild starts this program again in another role and waits until it is
// ready.
func (s *story) startChild(role string, env ...string) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{
		role: role, cmd: exec.Command(exe), dead: make(chan struct{}),
		ready: make(chan event, 1), result: make(chan event, 1), served: make(chan event, 16), ended: make(chan event, 16),
	}
	// Nothing that is set for other agents of the user concerns these.
	p.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "MESH_") })
	p.cmd.Env = append(append(p.cmd.Env, "QUICKSTART_ROLE="+role), env...)
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	p.in, p.close = json.NewEncoder(in), in.Close
	s.children = append(s.children, p)
	go p.listen(bufio.NewScanner(out))
	if p.first, err = p.next(s.ctx, p.ready); err != nil {
		return nil, err
	}
	return p, nil
}

// listen sorts the events of a child.
func (p *process) listen(lines *bufio.Scanner) {
	defer close(p.dead)
	for lines.Scan() {
		e := event{at: time.Now()}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			e = event{Event: evFailed, Error: "it says " + lines.Text()}
		}
		to := map[string]chan event{evReady: p.ready, evResult: p.result, evServed: p.served, evEnded: p.ended}[e.Event]
		if to == nil {
			p.failure = e
			return
		}
		select {
		case to <- e:
		default: // nobody asked for that many
		}
	}
}

// next waits for an event.
func (p *process) next(ctx context.Context, from <-chan event) (event, error) {
	select {
	case e := <-from:
		return e, nil
	default:
	}
	select {
	case e := <-from:
		return e, nil
	case <-p.dead:
		if p.failure.Error != "" {
			return event{}, fmt.Errorf("%s: %s", p.role, p.failure.Error)
		}
		return event{}, fmt.Errorf("%s died", p.role)
	case <-ctx.Done():
		return event{}, fmt.Errorf("waiting for %s: %w", p.role, context.Cause(ctx))
	}
}

// do gives an order and waits for its result.
func (p *process) do(ctx context.Context, o order) (event, error) {
	if err := p.in.Encode(o); err != nil {
		return event{}, fmt.Errorf("%s: %w", p.role, err)
	}
	return p.next(ctx, p.result)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// kill ends a child at once, without a chance to say goodbye.
func (s *story) kill(p *process) {
	p.cmd.Process.Kill()
	s.wait(p)
	s.children = slices.DeleteFunc(s.children, func(c *process) bool { return c == p })
}

// stopAll ends all children, the last started first, and waits for them.
func (s *story) stopAll() {
	for _, p := range slices.Backward(s.children) {
		p.close()
		kill := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
		s.wait(p)
		kill.Stop()
	}
	s.children = nil
}

// wait returns when the child is gone. One that failed was already heard of.
func (s *story) wait(p *process) {
	<-p.dead // all of its output is read
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.want(false, "the end of %s: %v", p.role, err)
	}
}
