package main

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"sync"
)

// lossy is a socket that loses one datagram of 200 and lets one of 100 wait for
// those that follow it.
type lossy struct {
	net.PacketConn

	mu   sync.Mutex // guards the fields below
	rand *rand.Rand
	late []byte // waits, for so many datagrams more
	to   net.Addr
	more int
}

func listenLossy(ctx context.Context, network, addr string) (net.PacketConn, error) {
	var c net.ListenConfig
	pc, err := c.ListenPacket(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &lossy{PacketConn: pc, rand: rand.New(rand.NewPCG(1, 2))}, nil
}

func (l *lossy) WriteTo(b []byte, to net.Addr) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.late != nil {
		if l.more--; l.more == 0 {
			l.PacketConn.WriteTo(l.late, l.to)
			l.late = nil
		}
	}
	switch {
	case l.rand.IntN(200) == 0:
		return len(b), nil
	case l.late == nil && l.rand.IntN(100) == 0:
		l.late, l.to, l.more = bytes.Clone(b), to, 1+l.rand.IntN(20)
		return len(b), nil
	}
	return l.PacketConn.WriteTo(b, to)
}
