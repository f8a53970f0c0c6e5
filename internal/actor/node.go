package actor

import (
	"bytes"
	"context"
	"crypto/sha256"
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
)

// NodeConfig is what a node process is told: see mesh.Node.
type NodeConfig struct {
	Hostname, ControlURL, ControlKey, AuthKey, Dir string
	RelayOnly                                      bool
}

// NodeReady is what a node process says when it is up.
type NodeReady struct {
	Seconds float64 // that Up took
}

// Transfer tells one end of a transfer what to do: dial Addr, or accept the
// next connection of the listener on Port.
type Transfer struct {
	Addr string
	Port int
	Size int64
	Seed uint64
}

// Transferred is what one end of a transfer saw.
type Transferred struct {
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
	var c NodeConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &agent{
		node: &mesh.Node{
			Hostname: c.Hostname, ControlURL: c.ControlURL, ControlKey: c.ControlKey, AuthKey: c.AuthKey,
			Dir: c.Dir, RelayOnly: c.RelayOnly,
		},
		ctx:       ctx,
		listeners: map[int]net.Listener{},
	}
	begin := time.Now()
	up, stop := context.WithTimeout(ctx, Patience)
	defer stop()
	if _, err := a.node.Up(up); err != nil {
		cancel()
		return nil, errors.Join(err, a.node.Close())
	}
	return &part{
		ready: NodeReady{time.Since(begin).Seconds()},
		commands: map[string]func(json.RawMessage) (any, error){
			"status":   func(json.RawMessage) (any, error) { return a.node.Status(), nil },
			"listen":   command(a.listen),
			"serve":    command(a.serve),
			"get":      command(a.get),
			"exchange": command(a.exchange),
			"received": func(json.RawMessage) (any, error) { return a.received.Load(), nil },
			"flow":     command(a.startFlow),
			"rounds":   func(json.RawMessage) (any, error) { return a.rounds.Load(), nil },
			"beat":     command(a.beat),
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

func (a *agent) open(addr string) (net.Conn, error) { return Open(a.ctx, a.node, addr) }

// Open dials a node process that was told to "serve" there, and checks its
// greeting.
func Open(ctx context.Context, n *mesh.Node, addr string) (net.Conn, error) {
	c, err := n.Dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	want := n.Status().Self.Name + "\n"
	got := make([]byte, len(want))
	c.SetReadDeadline(time.Now().Add(Patience))
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
	return nil, errors.Join(Round(c, rand.Uint64(), 1000), c.Close())
}

// Round sends random bytes to somebody who sends them back.
func Round(c net.Conn, seed uint64, size int) error {
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
			if err := Round(c, seed, 16<<10); err != nil {
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

// Counted counts what is read.
type Counted struct {
	net.Conn
	N *atomic.Int64
}

// Read reads from the connection.
func (c Counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.N.Add(int64(n))
	return n, err
}

func (a *agent) exchange(args Transfer) (any, error) {
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
	g.Go(func() (err error) { sent, err = Send(c, args.Seed, args.Size); return })
	g.Go(func() (err error) { received, err = Receive(Counted{c, &a.received}, args.Size); return })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return Transferred{hex.EncodeToString(sent), hex.EncodeToString(received), time.Since(begin).Seconds()}, nil
}

// Send writes n bytes that seed determines and returns their checksum.
func Send(c net.Conn, seed uint64, n int64) ([]byte, error) {
	src := io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n)
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{c}, io.TeeReader(src, h), make([]byte, 64<<10)); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	return h.Sum(nil), c.(interface{ CloseWrite() error }).CloseWrite()
}

// Receive reads to the end and returns the checksum of n bytes.
func Receive(c net.Conn, n int64) ([]byte, error) {
	h := sha256.New()
	got, err := io.CopyBuffer(h, struct{ io.Reader }{c}, make([]byte, 64<<10))
	if err == nil && got != n {
		err = fmt.Errorf("%d of %d bytes", got, n)
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return h.Sum(nil), nil
}
