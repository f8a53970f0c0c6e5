package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// HoldPort ends its half of a connection and keeps the other.
const HoldPort = 5005

// hold serves HoldPort.
func hold(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		h.CloseWrite()
	}
	io.Copy(io.Discard, c) // until the node ends
	c.Close()
}

// HalvesArgs tell how many connections the other side shall end: some whole,
// some half.
type HalvesArgs struct {
	Node, Addr   string
	Closed, Half int
}

// halves opens connections that the server closes, or half closes, and keeps the
// latter.
func (a *agent) halves(ctx context.Context, h HalvesArgs) (any, error) {
	n := a.node(h.Node)
	once := func(port int, keep bool) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		c, err := n.Dial(ctx, at2(h.Addr, port))
		if err != nil {
			return err
		}
		c.SetDeadline(time.Now().Add(Patience))
		if _, err := io.Copy(io.Discard, c); err != nil {
			c.Close()
			return err
		}
		if keep {
			return nil // until the node ends
		}
		return c.Close()
	}
	// Another stack may hang in one dial of a hundred, which is measured elsewhere.
	hung := 0
	open := func(port int, keep bool) error {
		err := once(port, keep)
		for ; err != nil && hung < 60 && ctx.Err() == nil; hung++ {
			err = once(port, keep)
		}
		return err
	}
	for i := range h.Half {
		if err := open(HoldPort, true); err != nil {
			return nil, fmt.Errorf("half closed connection %d: %w", i, err)
		}
	}
	for i := range h.Closed {
		if err := open(ShortPort, false); err != nil {
			return nil, fmt.Errorf("closed connection %d: %w", i, err)
		}
	}
	return nil, nil
}

// hangs is how long Close may take before it counts as one that never returns.
const hangs = 15 * time.Second

// Closed says how long Close took.
type Closed struct {
	Seconds float64
	Hung    bool // and has not returned yet
}

// down closes a node.
func (a *agent) down(_ context.Context, n NodeName) (any, error) {
	node := a.node(n.Node)
	if node == nil {
		return nil, fmt.Errorf("no node %s", n.Node)
	}
	a.mu.Lock()
	delete(a.nodes, n.Node)
	a.mu.Unlock()
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- node.Close() }()
	select {
	case err := <-done:
		return Closed{Seconds: time.Since(begin).Seconds()}, err
	case <-time.After(hangs):
		return Closed{time.Since(begin).Seconds(), true}, nil
	}
}

// ApplyArgs say how large a map to apply.
type ApplyArgs struct{ Peers int }

// Applied says what that took.
type Applied struct {
	First, Delta float64 // seconds: the first map, and a change of one peer
	Heap         float64 // bytes that the map in force keeps
}

func (a *agent) apply(_ context.Context, p ApplyArgs) (any, error) {
	if a.stack.Apply == nil {
		return nil, errors.New("the stack has no maps to apply")
	}
	return a.stack.Apply(p.Peers)
}
