package e2e

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"mesh"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// controlReady is what a control server process says when it runs.
type controlReady struct{ URL, Addr, Socket string }

func playControl(config json.RawMessage) (*part, error) {
	var c struct{ DataDir, Listen, Policy string }
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	h, err := host.Start(host.Config{DataDir: c.DataDir, Listen: c.Listen, PolicyFile: c.Policy, NoRelay: true})
	if err != nil {
		return nil, err
	}
	return &part{ready: controlReady{h.URL(), h.Addr(), h.Socket()}, close: h.Close}, nil
}

func playRelay(config json.RawMessage) (*part, error) {
	var c struct{ DataDir, ControlURL, RelayKey string }
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	r, err := host.StartRelay(host.RelayConfig{
		DataDir: c.DataDir, Listen: "127.0.0.1:0", STUN: "127.0.0.1:0",
		ControlURL: c.ControlURL, RelayKey: c.RelayKey,
	})
	if err != nil {
		return nil, err
	}
	select {
	case <-r.Announced():
	case err := <-r.Failed():
		return nil, errors.Join(err, r.Close())
	case <-time.After(meshtest.Patience):
		return nil, errors.Join(errors.New("not announced"), r.Close())
	}
	return &part{ready: struct{ Region int }{r.Region()}, close: r.Close}, nil
}

// nodeConfig is what a node process is told.
type nodeConfig struct {
	Hostname, ControlURL, AuthKey, Dir string
	RelayOnly                          bool
}

// exchangeArgs tells one end of a transfer what to do: dial Addr, or accept the
// next connection of the listener on Port.
type exchangeArgs struct {
	Addr string
	Port int
	Size int64
	Seed uint64
}

// exchangeResult is what one end of a transfer saw.
type exchangeResult struct {
	Sent, Received string // SHA-256
	Seconds        float64
}

// agent is the program of a node process.
type agent struct {
	node     *mesh.Node
	ctx      context.Context
	received atomic.Int64 // bytes of all transfers
	rounds   atomic.Int64 // of all flows

	mu        sync.Mutex // guards the fields below
	listeners map[int]net.Listener
	flow      *flow
	serving   sync.WaitGroup
}

// flow is a connection that an agent keeps busy.
type flow struct {
	stop chan struct{}
	err  chan error
}

func playNode(config json.RawMessage) (*part, error) {
	var c nodeConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &agent{
		node:      &mesh.Node{Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey, Dir: c.Dir, RelayOnly: c.RelayOnly},
		ctx:       ctx,
		listeners: map[int]net.Listener{},
	}
	begin := time.Now()
	up, stop := context.WithTimeout(ctx, meshtest.Patience)
	defer stop()
	if _, err := a.node.Up(up); err != nil {
		cancel()
		return nil, errors.Join(err, a.node.Close())
	}
	return &part{
		ready: struct{ Seconds float64 }{time.Since(begin).Seconds()},
		commands: map[string]func(json.RawMessage) (any, error){
			"status":   func(json.RawMessage) (any, error) { return a.node.Status(), nil },
			"listen":   command(a.listen),
			"serve":    command(a.serve),
			"get":      command(a.get),
			"exchange": command(a.exchange),
			"received": func(json.RawMessage) (any, error) { return a.received.Load(), nil },
			"flow":     command(a.startFlow),
			"rounds":   func(json.RawMessage) (any, error) { return a.rounds.Load(), nil },
			"endflow":  func(json.RawMessage) (any, error) { return nil, a.endFlow() },
		},
		close: func() error {
			cancel()
			err := a.node.Close()
			a.serving.Wait()
			return err
		},
	}, nil
}

// command reads a function's argument from JSON.
func command[A any](do func(A) (any, error)) func(json.RawMessage) (any, error) {
	return func(b json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(b, &args); err != nil {
			return nil, err
		}
		return do(args)
	}
}

func (a *agent) listen(port int) (any, error) {
	l, err := a.node.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.listeners[port] = l
	return nil, nil
}

// serve answers each connection with the caller's name, sends back what it
// gets and closes when the caller does.
func (a *agent) serve(port int) (any, error) {
	l, err := a.node.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	a.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.serving.Go(func() {
				defer c.Close()
				p, _ := mesh.PeerOf(c)
				fmt.Fprintln(c, p.Name)
				io.Copy(struct{ io.Writer }{c}, c)
			})
		}
	})
	return nil, nil
}

// open dials what serve serves and checks its greeting.
func (a *agent) open(addr string) (net.Conn, error) {
	c, err := a.node.Dial(a.ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	want := a.node.Status().Self.Name + "\n"
	got := make([]byte, len(want))
	c.SetReadDeadline(time.Now().Add(meshtest.Patience))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		c.Close()
		return nil, fmt.Errorf("greeting %q, %w", got, err)
	}
	return c, c.SetReadDeadline(time.Time{})
}

// get makes one short call.
func (a *agent) get(addr string) (any, error) {
	c, err := a.open(addr)
	if err != nil {
		return nil, err
	}
	return nil, errors.Join(round(c, rand.Uint64(), 1000), c.Close())
}

// round sends random bytes to somebody who sends them back.
func round(c net.Conn, seed uint64, size int) error {
	out := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(out)
	var g errgroup.Group
	g.Go(func() error { _, err := c.Write(out); return err })
	in := make([]byte, size)
	_, err := io.ReadFull(c, in)
	if err = errors.Join(err, g.Wait()); err == nil && !bytes.Equal(in, out) {
		err = errors.New("what came back is not what was sent")
	}
	return err
}

func (a *agent) startFlow(addr string) (any, error) {
	c, err := a.open(addr)
	if err != nil {
		return nil, err
	}
	f := &flow{stop: make(chan struct{}), err: make(chan error, 1)}
	a.mu.Lock()
	a.flow = f
	a.mu.Unlock()
	a.serving.Go(func() {
		defer c.Close()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for seed := uint64(0); ; seed++ {
			if err := round(c, seed, 16<<10); err != nil {
				f.err <- fmt.Errorf("round %d: %w", seed, err)
				return
			}
			a.rounds.Add(1)
			select {
			case <-f.stop:
				f.err <- nil
				return
			case <-a.ctx.Done():
				f.err <- a.ctx.Err()
				return
			case <-tick.C:
			}
		}
	})
	return nil, nil
}

func (a *agent) endFlow() error {
	a.mu.Lock()
	f := a.flow
	a.mu.Unlock()
	close(f.stop)
	return <-f.err
}

// counted counts what is read.
type counted struct {
	net.Conn
	n *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func (a *agent) exchange(args exchangeArgs) (any, error) {
	var c net.Conn
	var err error
	if args.Addr != "" {
		c, err = a.node.Dial(a.ctx, "tcp", args.Addr)
	} else {
		a.mu.Lock()
		l := a.listeners[args.Port]
		a.mu.Unlock()
		c, err = l.Accept()
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	begin := time.Now()
	var sent, received []byte
	var g errgroup.Group
	g.Go(func() (err error) { sent, err = send(c, args.Seed, args.Size); return })
	g.Go(func() (err error) { received, err = receive(counted{c, &a.received}, args.Size); return })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return exchangeResult{hex.EncodeToString(sent), hex.EncodeToString(received), time.Since(begin).Seconds()}, nil
}
