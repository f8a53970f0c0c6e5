package netstack

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// checkPacket verifies what the stack promises of a packet that leaves.
func checkPacket(t *testing.T, p []byte, mtu int) {
	t.Helper()
	if len(p) > mtu {
		t.Errorf("a packet of %d bytes, the MTU is %d", len(p), mtu)
	}
	var l4 []byte
	var pseudo uint16
	if p[0]>>4 == 4 {
		h := header.IPv4(p)
		if int(h.TotalLength()) != len(p) || h.HeaderLength() != 20 || checksum.Checksum(p[:20], 0) != 0xffff {
			t.Errorf("bad IPv4 header % x", p[:20])
		}
		l4 = p[20:]
		pseudo = header.PseudoHeaderChecksum(h.TransportProtocol(), h.SourceAddress(), h.DestinationAddress(), uint16(len(l4)))
	} else {
		h := header.IPv6(p)
		if int(h.PayloadLength()) != len(p)-40 {
			t.Errorf("bad IPv6 header % x", p[:40])
		}
		l4 = p[40:]
		next, ok := h.TryParseTransportProtocol()
		if !ok {
			t.Errorf("IPv6 header without transport protocol % x", p[:40])
		}
		pseudo = header.PseudoHeaderChecksum(next, h.SourceAddress(), h.DestinationAddress(), uint16(len(l4)))
	}
	if checksum.Checksum(l4, pseudo) != 0xffff {
		t.Errorf("bad checksum of a packet with %d bytes", len(p))
	}
}

// The link cuts large segments; look at each packet with our own eyes, as the
// receiving gVisor shares the code that makes them.
func TestSplit(t *testing.T) {
	const mtu = 1400
	a, b, w := newPair(t, Config{MTU: mtu})
	for _, addr := range []netip.Addr{b4, b6} {
		ca, cb := connect(t, a, b, addr)
		var (
			mu      sync.Mutex
			largest int
			stream  []byte
			next    uint32
			fins    int
			bad     bool
		)
		w.setFilter(func(toB bool, packets [][]byte) [][]byte {
			if !toB || flowIn(packets[0]) != ca.Flow() {
				return packets
			}
			mu.Lock()
			defer mu.Unlock()
			largest = max(largest, len(packets))
			wire := 0
			for i, p := range packets {
				checkPacket(t, p, mtu)
				wire += (len(p)+15)&^15 + 32
				l3 := 40
				if addr.Is4() {
					l3 = 20
				}
				tcp := header.TCP(p[l3:])
				payload := tcp.Payload()
				flags := tcp.Flags()
				if i < len(packets)-1 && flags&(header.TCPFlagPsh|header.TCPFlagFin) != 0 {
					t.Errorf("flags %v on packet %d of %d", flags, i, len(packets))
				}
				if flags&header.TCPFlagFin != 0 {
					fins++
				}
				if len(payload) == 0 {
					continue
				}
				if len(stream) > 0 && tcp.SequenceNumber() != next {
					bad = true // a retransmission
				}
				stream = append(stream, payload...)
				next = tcp.SequenceNumber() + uint32(len(payload))
			}
			if wire > maxTrain {
				t.Errorf("a train of %d packets is %d bytes on the wire", len(packets), wire)
			}
			return packets
		})
		sent := make([]byte, 2_000_003)
		for i := range sent {
			sent[i] = byte(i * 7 >> 3)
		}
		go func() {
			ca.Write(sent)
			ca.CloseWrite()
		}()
		got, err := io.ReadAll(cb)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%v: received %d bytes: %v", addr, len(got), err)
		}
		mu.Lock()
		if !bad && !bytes.Equal(stream, sent) {
			t.Errorf("%v: %d bytes on the wire, not what was sent", addr, len(stream))
		}
		if largest < 5 || fins == 0 {
			t.Errorf("%v: largest batch %d packets, %d FINs", addr, largest, fins)
		}
		mu.Unlock()
		ca.Close()
		cb.Close()
	}
}

func TestIPv4Identification(t *testing.T) {
	// Whatever gVisor decides about fragmentation, IDs of one train follow its rule.
	a, b, w := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		for i := 1; toB && i < len(packets); i++ {
			prev, h := header.IPv4(packets[i-1]), header.IPv4(packets[i])
			if df := h.Flags()&header.IPv4FlagDontFragment != 0; !df && h.ID() != prev.ID()+1 || df && h.ID() != prev.ID() {
				t.Errorf("don't fragment %v, identification %d after %d", df, h.ID(), prev.ID())
			}
		}
		return packets
	})
	go func() {
		ca.Write(make([]byte, 500_000))
		ca.Close()
	}()
	if n, err := io.Copy(io.Discard, cb); n != 500_000 || err != nil {
		t.Errorf("received %d bytes: %v", n, err)
	}
}

// A stack says nothing on its own: no router solicitation, no duplicate address
// detection, no multicast report.
func TestSilent(t *testing.T) {
	var mu sync.Mutex
	var said [][]byte
	s, err := New(Config{Out: func(packets [][]byte) {
		mu.Lock()
		defer mu.Unlock()
		for _, p := range packets {
			said = append(said, bytes.Clone(p))
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, addrs := range [][]netip.Addr{{a4, a6}, {a4, b6}, nil, {b4}} {
		if err := s.SetAddrs(addrs); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	if len(said) > 0 {
		t.Errorf("sent %d packets, the first % x", len(said), said[0])
	}
}

// ping builds an ICMP echo request.
func ping(from, to netip.Addr, payload []byte) []byte {
	n := 8 + len(payload)
	if from.Is4() {
		p := make([]byte, 20+n)
		ip := header.IPv4(p)
		ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(p)), TTL: 64, Protocol: 1, SrcAddr: toAddress(from), DstAddr: toAddress(to)})
		ip.SetChecksum(^ip.CalculateChecksum())
		p[20] = 8
		binary.BigEndian.PutUint32(p[24:], 0x12340001)
		copy(p[28:], payload)
		binary.BigEndian.PutUint16(p[22:], ^checksum.Checksum(p[20:], 0))
		return p
	}
	p := make([]byte, 40+n)
	header.IPv6(p).Encode(&header.IPv6Fields{PayloadLength: uint16(n), TransportProtocol: 58, HopLimit: 64, SrcAddr: toAddress(from), DstAddr: toAddress(to)})
	p[40] = 128
	binary.BigEndian.PutUint32(p[44:], 0x12340001)
	copy(p[48:], payload)
	sum := header.PseudoHeaderChecksum(58, toAddress(from), toAddress(to), uint16(n))
	binary.BigEndian.PutUint16(p[42:], ^checksum.Checksum(p[40:], sum))
	return p
}

func TestEcho(t *testing.T) {
	replies := make(chan []byte, 10)
	s, err := New(Config{Out: func(packets [][]byte) {
		for _, p := range packets {
			replies <- bytes.Clone(p)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.SetAddrs([]netip.Addr{b4, b6}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		from, to netip.Addr
		typ      byte
		at       int
	}{{a4, b4, 0, 20}, {a6, b6, 129, 40}} {
		s.In([][]byte{ping(tc.from, tc.to, []byte("hello"))})
		p := <-replies
		if p[tc.at] != tc.typ || !bytes.HasSuffix(p, []byte("hello")) {
			t.Errorf("answer to a ping of %v: % x", tc.to, p)
		}
	}
	// Others' addresses and one's own as a source are not served.
	s.In([][]byte{
		ping(a4, netip.MustParseAddr("100.64.0.99"), nil),
		ping(b4, b4, nil),
		ping(b6, b6, nil),
		ping(a4, netip.MustParseAddr("224.0.0.1"), nil),
		ping(a6, netip.MustParseAddr("ff02::1"), nil),
		ping(netip.MustParseAddr("127.0.0.1"), b4, nil),
	})
	if len(replies) > 0 {
		t.Errorf("answered % x", <-replies)
	}
}

func TestAdmit(t *testing.T) {
	ip4 := func(change func(p []byte)) []byte {
		p := ping(a4, b4, make([]byte, 8))
		change(p)
		return p
	}
	ip6 := func(change func(p []byte)) []byte {
		p := ping(a6, b6, make([]byte, 8))
		change(p)
		return p
	}
	none := func([]byte) {}
	for _, tc := range []struct {
		name string
		p    []byte
		want bool
	}{
		{"IPv4", ip4(none), true},
		{"IPv6", ip6(none), true},
		{"nothing", nil, false},
		{"short IPv4", ip4(none)[:19], false},
		{"short IPv6", ip6(none)[:39], false},
		{"version 5", ip4(func(p []byte) { p[0] = 0x55 }), false},
		{"fragmentation needed", ip4(func(p []byte) { p[20], p[21] = 3, 4 }), false},
		{"port unreachable", ip4(func(p []byte) { p[20], p[21] = 3, 3 }), true},
		{"redirect", ip4(func(p []byte) { p[20] = 5 }), false},
		{"packet too big", ip6(func(p []byte) { p[40] = 2 }), false},
		{"unreachable", ip6(func(p []byte) { p[40] = 1 }), true},
		{"router advertisement", ip6(func(p []byte) { p[40] = 134 }), false},
		{"multicast listener report", ip6(func(p []byte) { p[40] = 143 }), false},
		{"from loopback", ip4(func(p []byte) { p[12] = 127 }), false},
		{"to broadcast", ip4(func(p []byte) { copy(p[16:], "\xff\xff\xff\xff") }), false},
		{"from ::1", ip6(func(p []byte) { copy(p[8:], netip.IPv6Loopback().AsSlice()) }), false},
		{"too long", append(ip4(none), make([]byte, maxMTU)...), false},
	} {
		if _, got := admit(tc.p); got != tc.want {
			t.Errorf("%s: admitted %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestGSOSize(t *testing.T) {
	for _, mtu := range []int{1280, 1420, 1500, 8900, 32000, 65000, 65535} {
		if n := gsoSize(mtu); n < 2048 || n > maxTrain {
			t.Errorf("MTU %d: segments of up to %d bytes", mtu, n)
		}
	}
	a, b, w := newPair(t, Config{MTU: 65535})
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		for _, p := range packets {
			checkPacket(t, p, 65535)
		}
		return packets
	})
	ca, cb := connect(t, a, b, b6)
	go func() {
		ca.Write(make([]byte, 1<<20))
		ca.Close()
	}()
	if n, err := io.Copy(io.Discard, cb); n != 1<<20 || err != nil {
		t.Errorf("received %d bytes: %v", n, err)
	}
}

func TestNewErrors(t *testing.T) {
	out := func([][]byte) {}
	for name, c := range map[string]Config{
		"no Out":                  {},
		"small MTU":               {Out: out, MTU: 1279},
		"large MTU":               {Out: out, MTU: 65536},
		"negative":                {Out: out, MTU: -1},
		"small backlog":           {Out: out, Limits: Limits{AcceptBacklog: -1}},
		"little memory":           {Out: out, Limits: Limits{ReceiveMemory: 10_000}},
		"too much for the memory": {Out: out, Limits: Limits{ReceiveMemory: 1 << 20, Connections: 33}},
	} {
		if s, err := New(c); err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzIn(f *testing.F) {
	var captured [][]byte
	var mu sync.Mutex
	seed := func(packets [][]byte) {
		mu.Lock()
		defer mu.Unlock()
		for _, p := range packets {
			captured = append(captured, bytes.Clone(p))
		}
	}
	s, err := New(Config{Out: seed})
	if err != nil {
		f.Fatal(err)
	}
	if err := s.SetAddrs([]netip.Addr{a4, a6}); err != nil {
		f.Fatal(err)
	}
	for _, to := range []netip.Addr{b4, b6} {
		u, err := s.DialUDP(netip.Addr{}, netip.AddrPortFrom(to, 80))
		if err != nil {
			f.Fatal(err)
		}
		u.Write(make([]byte, 100))
		u.Write(make([]byte, 3000)) // in fragments
		u.Close()
	}
	s.Close()
	for _, p := range slices.Concat(captured, [][]byte{
		ping(a4, b4, make([]byte, 20)), ping(a6, b6, make([]byte, 20)), {}, {0x45}, {0x60}, bytes.Repeat([]byte{0x46}, 60),
	}) {
		f.Add(p)
	}
	target, err := New(Config{Out: func([][]byte) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { target.Close() })
	if err := target.SetAddrs([]netip.Addr{b4, b6}); err != nil {
		f.Fatal(err)
	}
	l := listen(f, target, "tcp", netip.AddrPortFrom(netip.Addr{}, 80))
	u, err := target.ListenUDP("udp", netip.AddrPortFrom(netip.Addr{}, 80))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close(); u.Close() })
	f.Fuzz(func(t *testing.T, p []byte) {
		target.In([][]byte{p})
		// Once more with addresses that are served and a good header checksum,
		// so that the fuzzer reaches the upper layers.
		if len(p) >= 20 && p[0]>>4 == 4 {
			q := bytes.Clone(p)
			copy(q[12:], a4.AsSlice())
			copy(q[16:], b4.AsSlice())
			if h := header.IPv4(q); int(h.HeaderLength()) >= 20 && int(h.HeaderLength()) <= len(q) {
				h.SetChecksum(0)
				h.SetChecksum(^h.CalculateChecksum())
			}
			target.In([][]byte{q})
		}
		if len(p) >= 40 && p[0]>>4 == 6 {
			q := bytes.Clone(p)
			copy(q[8:], a6.AsSlice())
			copy(q[24:], b6.AsSlice())
			target.In([][]byte{q})
		}
	})
}

// Bulk data goes in packets as large as the way takes at the moment, and whoever
// takes them gets the same stream.
func TestPacketSize(t *testing.T) {
	const mtu = 1280
	sizes := []int{0, 8912, 65000, 1279, 61408, 16304, 1300, 40}
	var mu sync.Mutex
	asked, largest := 0, 0
	a, b, w := newPair(t, Config{MTU: mtu, PacketSize: func(dst netip.Addr) int {
		mu.Lock()
		defer mu.Unlock()
		if dst != a4 && dst != a6 && dst != b4 && dst != b6 {
			t.Errorf("asked for %v", dst)
		}
		asked++
		return sizes[asked%len(sizes)]
	}})
	for i, addr := range []netip.Addr{b4, b6, b4} {
		ca, cb := connect(t, a, b, addr)
		if i == 2 {
			lossy(w)
		} else {
			w.setFilter(func(toB bool, packets [][]byte) [][]byte {
				mu.Lock()
				defer mu.Unlock()
				for _, p := range packets {
					checkPacket(t, p, maxTrain)
					largest = max(largest, len(p))
				}
				return packets
			})
		}
		size := int64(4 << 20)
		if i == 2 && raceEnabled {
			size >>= 3
		}
		exchange(t, ca, cb, size, byte(i))
		ca.Close()
		cb.Close()
	}
	if largest < 10000 {
		t.Errorf("the largest packet has %d bytes", largest)
	}
}
