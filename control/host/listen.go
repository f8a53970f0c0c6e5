package host

import (
	"context"
	"net"
	"syscall"
	"time"
)

// The kernel asks silent connections whether they live, so that the processes at
// both ends need not wake for it: of ten thousand idle nodes, that was half of what
// they cost. One whose host is gone ends after deadAfter.
const (
	probeAfter = 15 * time.Second
	probeEvery = 10 * time.Second
	probes     = 3
	deadAfter  = probeAfter + probes*probeEvery
)

// liveListener ends connections whose other end is gone.
type liveListener struct{ net.Listener }

// listen listens for nodes and relays at a TCP address.
func listen(addr string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeEvery, Count: probes}}
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	return liveListener{ln}, nil
}

// Accept waits for the next connection.
func (l liveListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if t, ok := c.(syscall.Conn); ok {
		endUnanswered(t)
	}
	return c, err
}
