package e2e

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"mesh/control"
	"mesh/control/admin"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/engine"
	"mesh/internal/meshtest"
	"mesh/internal/netmap"
	"mesh/internal/path"
)

// rawNode is an enrolled node without a network stack: a test sends what
// packets it likes and sees those that come.
type rawNode struct {
	t      testing.TB
	state  identity.State
	client *control.Client
	engine *engine.Engine

	mu      sync.Mutex // guards the fields below
	packets [][]byte   // that came
	refused []error    // given to Reject
}

// enrolRaw enrols a node that does nothing by itself.
func enrolRaw(t testing.TB, m *meshtest.Mesh, name string, tags []string) *rawNode {
	t.Helper()
	r := &rawNode{t: t, state: identity.State{Machine: identity.NewMachine(), Node: identity.NewNode()}}
	var err error
	r.client, err = control.New(control.Config{URL: m.Host.URL(), Machine: r.state.Machine})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.client.Close() })
	_, err = r.client.Register(t.Context(), wire.RegisterRequest{
		Version:  wire.CapabilityVersion,
		NodeKey:  r.state.Node.Public(),
		Hostinfo: rawInfo(name),
		Auth:     &wire.RegisterAuth{AuthKey: m.Key(admin.KeyCreate{Tags: tags})},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func rawInfo(name string) *wire.Hostinfo { return &wire.Hostinfo{Hostname: name, IPNVersion: "raw"} }

// newRaw enrols a raw node and keeps it connected until the test ends.
func newRaw(t testing.TB, m *meshtest.Mesh, name string, tags []string) *rawNode {
	t.Helper()
	r := enrolRaw(t, m, name, tags)
	var err error
	disco := identity.NewDisco()
	reports := make(chan path.Report, 16)
	ctx, cancel := context.WithCancel(context.Background())
	r.engine, err = engine.New(engine.Config{
		Key:               r.state.Node,
		Disco:             disco,
		Link:              rawLink{r},
		LoopbackEndpoints: true,
		Report: func(p path.Report) {
			select {
			case reports <- p:
			case <-ctx.Done():
			}
		},
	})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	session := r.client.NewSession(control.SessionConfig{
		NodeKey: r.state.Node.Public(),
		OnMap:   func(n *netmap.Map, d netmap.Delta) { r.engine.Apply(n, d) },
	})
	session.SetHostState(control.HostState{DiscoKey: disco.Public(), Hostinfo: rawInfo(name)})
	var wg sync.WaitGroup
	wg.Go(func() { session.Run(ctx) })
	wg.Go(func() {
		for {
			select {
			case p := <-reports:
				h := rawInfo(name)
				h.NetInfo = &p.NetInfo
				session.SetHostState(control.HostState{DiscoKey: disco.Public(), Hostinfo: h, Endpoints: p.Endpoints, EndpointTypes: p.Types})
			case <-ctx.Done():
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		r.engine.Close()
	})
	wait, stop := context.WithTimeout(t.Context(), meshtest.Patience)
	defer stop()
	if err := r.engine.Ready(wait); err != nil {
		t.Fatal(err)
	}
	return r
}

type rawLink struct{ r *rawNode }

func (l rawLink) In(packets [][]byte) {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	for _, p := range packets {
		l.r.packets = append(l.r.packets, slices.Clone(p))
	}
}

func (l rawLink) SetAddrs([]netip.Addr) error { return nil }

func (l rawLink) Reject(_ uint8, _, _ netip.AddrPort, err error) bool {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	l.r.refused = append(l.r.refused, err)
	return true
}

func (l rawLink) AbortFlow(uint8, netip.AddrPort, netip.AddrPort, error) bool { return false }

func (l rawLink) Abort(func(uint8, netip.AddrPort, netip.AddrPort) bool, error) int { return 0 }

func (r *rawNode) seen() (packets [][]byte, refused []error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.packets), slices.Clone(r.refused)
}

func (r *rawNode) addr() netip.Addr { return r.engine.Map().SelfIdentity().Addresses[0] }

// knows waits until the node sees a peer of that name.
func (r *rawNode) knows(name string) {
	r.t.Helper()
	meshtest.Until(r.t, "a raw node to know "+name, func() bool {
		_, ok := r.engine.Map().PeerByName(name)
		return ok
	})
}

// TCP flags and UDP as the protocol numbers of packet.
const (
	fin, syn, rst, psh, ack = 1, 2, 4, 8, 16

	protoTCP, protoUDP = 6, 17
)

// packet makes an IPv4 packet with a payload, checksums included.
func packet(proto byte, src, dst netip.AddrPort, flags byte, payload string) []byte {
	header := 20
	if proto == protoUDP {
		header = 8
	}
	b := make([]byte, 20+header, 20+header+len(payload))
	b = append(b, payload...)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:20]))
	h := b[20:]
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	at := 6
	if proto == protoTCP {
		binary.BigEndian.PutUint32(h[4:], 1000)
		if flags&ack != 0 {
			binary.BigEndian.PutUint32(h[8:], 2000)
		}
		h[12], h[13] = 5<<4, flags
		binary.BigEndian.PutUint16(h[14:], 65535)
		at = 16
	} else {
		binary.BigEndian.PutUint16(h[4:], uint16(len(h)))
	}
	pseudo := uint32(proto) + uint32(len(h))
	binary.BigEndian.PutUint16(h[at:], ^sum(pseudo+uint32(sum(0, b[12:20])), h))
	return b
}

// sum is the Internet checksum, not inverted.
func sum(from uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		from += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		from += uint32(b[len(b)-1]) << 8
	}
	for from > 0xffff {
		from = from>>16 + from&0xffff
	}
	return uint16(from)
}
