package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"mesh/internal/bench/load"
)

// stack is something to measure.
type stack struct {
	name     string
	cmd      []string
	servers  bool   // nodes need servers
	ours     bool   // this library, in some build
	relayEnv string // makes nodes use the relay only; "" = NodeArgs does
}

// process is a process of a stack.
type process struct {
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan struct{} // closed when standard output ended

	mu    sync.Mutex // guards the fields below
	next  int64
	calls map[int64]chan load.Response
}

func start(s *stack, name string, env ...string) (*process, error) {
	p := &process{
		name: s.name + "/" + name, cmd: exec.Command(s.cmd[0], s.cmd[1:]...),
		ended: make(chan struct{}), calls: make(map[int64]chan load.Response),
	}
	// The stock client would send its logs to its vendor, and look for routers.
	p.cmd.Env = append(os.Environ(), "TS_NO_LOGS_NO_SUPPORT=true", "TS_DISABLE_PORTMAPPER=1")
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stderr = os.Stderr
	together(p.cmd)
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.read(out)
	return p, nil
}

func (p *process) read(out io.Reader) {
	defer close(p.ended)
	in := bufio.NewScanner(out)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r load.Response
		if json.Unmarshal(in.Bytes(), &r) != nil {
			continue // some library's chatter
		}
		p.mu.Lock()
		c := p.calls[r.ID]
		delete(p.calls, r.ID)
		p.mu.Unlock()
		if c != nil {
			c <- r
		}
	}
}

// stop ends the process.
func (p *process) stop() {
	p.stdin.Close()
	select {
	case <-p.ended:
	case <-time.After(10 * time.Second):
		p.cmd.Process.Kill()
	}
	p.cmd.Wait()
}

// call makes the process do something and decodes its answer into result.
func (p *process) call(op string, args, result any) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return err
	}
	answer := make(chan load.Response, 1)
	p.mu.Lock()
	p.next++
	id := p.next
	p.calls[id] = answer
	line, _ := json.Marshal(load.Request{ID: id, Op: op, Args: raw})
	_, err = p.stdin.Write(append(line, '\n'))
	p.mu.Unlock()
	if err == nil {
		select {
		case r := <-answer:
			if r.Error != "" {
				err = errors.New(r.Error)
			} else if result != nil {
				err = json.Unmarshal(r.Result, result)
			}
		case <-p.ended:
			err = errors.New("the process ended")
		case <-time.After(2 * load.Patience):
			err = errors.New("no answer")
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w", p.name, op, err)
	}
	return nil
}
