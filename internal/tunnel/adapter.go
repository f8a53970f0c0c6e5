package tunnel

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"sync"

	"go.uber.org/zap"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"mesh/identity"
)

// fakeTUN is the interface that the Device believes to serve.
type fakeTUN struct {
	t      *Tunnel
	events chan tun.Event // never used, but its closing ends a goroutine of the Device
	down   chan struct{}
	once   sync.Once

	// Only the Device's reader touches these.
	rest    *train
	holding bool // this reader holds Tunnel.route
}

var _ tun.Device = (*fakeTUN)(nil)

func newFakeTUN(t *Tunnel) *fakeTUN {
	return &fakeTUN{t: t, events: make(chan tun.Event), down: make(chan struct{})}
}

// Read returns packets for the Device to route. By the time it is called again
// the Device has routed them, which is what Tunnel.route protects.
func (f *fakeTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	t := f.t
	if f.holding {
		f.holding = false
		t.route.Unlock()
	}
	for {
		if f.rest == nil {
			select {
			case <-f.down:
				return 0, os.ErrClosed
			case f.rest = <-t.out:
			}
		}
		t.route.Lock()
		n := 0
		for f.rest != nil && n < len(bufs) {
			n = t.fill(f.rest, bufs, sizes, offset, n)
			if f.rest.next < f.rest.n {
				break
			}
			f.rest.free()
			select {
			case f.rest = <-t.out:
			default:
				f.rest = nil
			}
		}
		if n > 0 {
			f.holding = true
			return n, nil
		}
		t.route.Unlock()
	}
}

// Write takes packets that the Device has opened.
func (f *fakeTUN) Write(bufs [][]byte, offset int) (int, error) {
	f.t.deliver(bufs, offset)
	return len(bufs), nil
}

func (f *fakeTUN) Close() error {
	f.once.Do(func() {
		close(f.down)
		close(f.events)
	})
	return nil
}

func (f *fakeTUN) File() *os.File           { return nil }
func (f *fakeTUN) MTU() (int, error)        { return MTU, nil }
func (f *fakeTUN) Name() (string, error)    { return "mesh", nil }
func (f *fakeTUN) Events() <-chan tun.Event { return f.events }
func (f *fakeTUN) BatchSize() int           { return batchSize }

// fakeBind is what the Device believes to be its sockets.
type fakeBind struct {
	t    *Tunnel
	mu   sync.Mutex // guards down
	down chan struct{}
}

var _ conn.Bind = (*fakeBind)(nil)

func (b *fakeBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	down := make(chan struct{})
	b.down = down
	var rest *train
	return []conn.ReceiveFunc{func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		set := func(i int, ep *endpoint) { eps[i] = ep }
		for {
			if rest == nil {
				select {
				case <-down:
					return 0, net.ErrClosed
				case rest = <-b.t.in:
				}
			}
			n := 0
			for rest != nil && n < len(bufs) {
				n = b.t.unload(rest, bufs, sizes, set, n)
				if rest.next < rest.n {
					break
				}
				rest.free()
				select {
				case rest = <-b.t.in:
				default:
					rest = nil
				}
			}
			if n > 0 {
				return n, nil
			}
		}
	}}, 0, nil
}

func (b *fakeBind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down != nil {
		close(b.down)
		b.down = nil
	}
	return nil
}

func (b *fakeBind) Send(bufs [][]byte, ep conn.Endpoint) error { return b.t.transmit(bufs, ep) }
func (b *fakeBind) SetMark(uint32) error                       { return nil }
func (b *fakeBind) BatchSize() int                             { return batchSize }

// ParseEndpoint reads the name of a pseudo endpoint: a configured peer's key.
func (b *fakeBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != identity.KeyLen {
		return nil, fmt.Errorf("endpoint is not a node key")
	}
	b.t.mu.RLock()
	defer b.t.mu.RUnlock()
	p := b.t.peers[identity.NodePublicFrom([identity.KeyLen]byte(raw))]
	if p == nil {
		return nil, fmt.Errorf("endpoint: %w", ErrUnknownPeer)
	}
	return p.home, nil
}

// deviceLogger shows the Device's messages to those who debug.
func deviceLogger(log *zap.Logger) *device.Logger {
	if !log.Core().Enabled(zap.DebugLevel) {
		return &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf}
	}
	debugf := log.WithOptions(zap.AddCallerSkip(1)).Sugar().Debugf
	return &device.Logger{Verbosef: debugf, Errorf: debugf}
}
