package loadtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"mesh"
)

// realTag is what real nodes beside the simulated ones have.
const realTag = "tag:real"

const (
	blockSize  = 16 << 10
	blockEvery = 20 * time.Millisecond
	// brokenAfter is how long a connection may stand still before it counts as
	// broken.
	brokenAfter = 30 * time.Second
)

// pair is two real nodes and a connection between them that is in use all the
// time.
type pair struct {
	how   string
	nodes [2]*mesh.Node
	home  int // relay of the receiver, at first
	wg    sync.WaitGroup
	end   chan struct{} // closed by stop

	// Written before wg is done.
	sent, got uint64        // blocks
	pause     time.Duration // the longest in which nothing came
	errs      [2]error
}

// newPair brings two nodes up, which talk by relay only or as they like, and
// starts a transfer from one to the other.
func (m *Mesh) newPair(ctx context.Context, how string, relayOnly bool, authKey string) (_ *pair, err error) {
	p := &pair{how: how, end: make(chan struct{})}
	defer func() {
		if err != nil {
			p.close()
			err = fmt.Errorf("a pair of nodes that talk %s: %w", how, err)
		}
	}()
	for i := range p.nodes {
		p.nodes[i] = &mesh.Node{
			Hostname: fmt.Sprintf("real-%s-%d", how, i), ControlURL: m.cfg.URL, ControlKey: m.cfg.Key.String(),
			AuthKey: authKey, Ephemeral: true, RelayOnly: relayOnly, NoPortMapping: true,
		}
		if _, err := p.nodes[i].Up(ctx); err != nil {
			return nil, err
		}
	}
	l, err := p.nodes[1].Listen("tcp", ":7")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	out, err := p.nodes[0].Dial(ctx, "tcp", p.nodes[1].Hostname+":7")
	if err != nil {
		return nil, err
	}
	in, err := l.Accept()
	if err != nil {
		out.Close()
		return nil, err
	}
	p.home = p.nodes[1].Status().HomeRelay
	p.wg.Go(func() { p.errs[0] = p.send(out) })
	p.wg.Go(func() { p.errs[1] = p.receive(in) })
	return p, nil
}

// block fills b with what the block of that number holds.
func block(b []byte, number uint64) {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], number<<16+uint64(i))
	}
}

// send writes blocks at a steady pace until the pair is to stop.
func (p *pair) send(c net.Conn) error {
	defer c.Close()
	b := make([]byte, blockSize)
	tick := time.NewTicker(blockEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.end:
			return nil
		case <-tick.C:
		}
		block(b, p.sent)
		c.SetWriteDeadline(time.Now().Add(brokenAfter))
		if _, err := c.Write(b); err != nil {
			return err
		}
		p.sent++
	}
}

// receive wants all blocks, one after the other, until the sender's end.
func (p *pair) receive(c net.Conn) error {
	defer c.Close()
	b, want := make([]byte, blockSize), make([]byte, blockSize)
	for last := time.Now(); ; {
		c.SetReadDeadline(time.Now().Add(brokenAfter))
		if _, err := io.ReadFull(c, b); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		now := time.Now()
		p.pause, last = max(p.pause, now.Sub(last)), now
		if block(want, p.got); !bytes.Equal(b, want) {
			return fmt.Errorf("block %d is not what was sent", p.got)
		}
		p.got++
	}
}

// stop ends the transfer and the nodes, and says how it went.
func (p *pair) stop() (note string, err error) {
	relay := p.nodes[1].Status().HomeRelay
	close(p.end)
	p.wg.Wait()
	p.close()
	if err = errors.Join(p.errs[:]...); err == nil && p.sent != p.got {
		err = fmt.Errorf("%d blocks of %d arrived", p.got, p.sent)
	}
	if err != nil {
		err = fmt.Errorf("the connection %s broke: %w", p.how, err)
	}
	note = fmt.Sprintf("transfer %s (home relay %d, then %d): %.1f MB, longest pause %.2f s", p.how, p.home, relay, float64(p.got)*blockSize/1e6, p.pause.Seconds())
	return note, err
}

func (p *pair) close() {
	for _, n := range p.nodes {
		if n != nil {
			n.Close()
		}
	}
}
