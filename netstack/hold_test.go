package netstack

import (
	"encoding/binary"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// say makes a packet of a connection: from a4 or a6, with n bytes of data.
func say(v4 bool, port uint16, flags header.TCPFlags, ack uint32, window uint16, n int, options ...byte) []byte {
	packets, _ := burst(v4, 1, 2*n, options)
	p := packets[0]
	tcp := p[20:]
	if !v4 {
		tcp = p[40:]
	}
	binary.BigEndian.PutUint16(tcp, port)
	binary.BigEndian.PutUint32(tcp[header.TCPAckNumOffset:], ack)
	binary.BigEndian.PutUint16(tcp[header.TCPWinSizeOffset:], window)
	tcp[header.TCPFlagsOffset] = byte(flags)
	return p
}

// Only an acknowledgement waits that is news and nothing else.
func TestHoldKeeps(t *testing.T) {
	const (
		ackOnly = header.TCPFlagAck
		syn     = header.TCPFlagSyn
		data    = header.TCPFlagAck | header.TCPFlagPsh
	)
	timestamp := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	sack := []byte{1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	for _, v4 := range []bool{true, false} {
		pkt := func(flags header.TCPFlags, ack uint32, window uint16, n int, options ...byte) []byte {
			return say(v4, 1000, flags, ack, window, n, options...)
		}
		request := pkt(data, 100, 500, 10)
		for name, c := range map[string]struct {
			sent  [][]byte // all but the last leave or wait as they may
			waits bool     // the last one
			first bool     // what waited leaves before it
		}{
			"news":                    {[][]byte{request, pkt(ackOnly, 101, 500, 0)}, true, false},
			"news with a timestamp":   {[][]byte{request, pkt(ackOnly, 101, 500, 0, timestamp...)}, true, false},
			"news past the wrap":      {[][]byte{pkt(data, 1<<32-1, 500, 10), pkt(ackOnly, 7, 500, 0)}, true, false},
			"data":                    {[][]byte{request, pkt(data, 101, 500, 1)}, false, false},
			"unknown connection":      {[][]byte{pkt(ackOnly, 101, 500, 0)}, false, false},
			"end of the handshake":    {[][]byte{request, pkt(syn, 0, 500, 0), pkt(ackOnly, 101, 500, 0)}, true, false},
			"end of an answered one":  {[][]byte{pkt(syn|ackOnly, 100, 500, 0), pkt(ackOnly, 100, 500, 0)}, false, false},
			"end of it twice":         {[][]byte{pkt(syn, 0, 500, 0), pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 101, 500, 0)}, false, true},
			"data after the end":      {[][]byte{pkt(syn, 0, 500, 0), pkt(ackOnly, 101, 500, 0), pkt(data, 101, 500, 1)}, false, false},
			"news after the end":      {[][]byte{pkt(syn, 0, 500, 0), pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 102, 500, 0)}, false, false},
			"duplicate":               {[][]byte{request, pkt(ackOnly, 100, 500, 0)}, false, false},
			"old":                     {[][]byte{request, pkt(ackOnly, 99, 500, 0)}, false, false},
			"duplicate of one held":   {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 101, 500, 0)}, false, true},
			"window after one held":   {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 101, 600, 0)}, false, true},
			"second":                  {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 102, 500, 0)}, false, false},
			"third":                   {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(ackOnly, 102, 500, 0), pkt(ackOnly, 103, 500, 0)}, true, false},
			"after data":              {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(data, 101, 500, 1), pkt(ackOnly, 102, 500, 0)}, true, false},
			"after data of old times": {[][]byte{request, pkt(ackOnly, 101, 500, 0), pkt(data, 100, 500, 1), pkt(ackOnly, 102, 500, 0)}, false, false},
			"much":                    {[][]byte{request, pkt(ackOnly, 100+2400, 500, 0)}, false, false},
			"SACK":                    {[][]byte{request, pkt(ackOnly, 101, 500, 0, sack...)}, false, false},
			"window opens":            {[][]byte{request, pkt(ackOnly, 101, 1001, 0)}, false, false},
			"window was shut":         {[][]byte{pkt(data, 100, 0, 10), pkt(ackOnly, 101, 0, 0)}, false, false},
			"FIN":                     {[][]byte{request, pkt(ackOnly|header.TCPFlagFin, 101, 500, 0)}, false, false},
			"RST":                     {[][]byte{request, pkt(ackOnly|header.TCPFlagRst, 101, 500, 0)}, false, false},
			"ECE":                     {[][]byte{request, pkt(ackOnly|0x40, 101, 500, 0)}, false, false},
			"other connection":        {[][]byte{request, say(v4, 1001, ackOnly, 101, 500, 0)}, false, false},
			"nothing":                 {[][]byte{request, {}}, false, false},
		} {
			var h hold
			h.init(1280, func([][]byte) {})
			var waits bool
			var first []byte
			for _, p := range c.sent {
				waits, first = h.keep(p)
			}
			if waits != c.waits || (first != nil) != c.first {
				t.Errorf("v4 %v: %s: waits %v, another before it %v", v4, name, waits, first != nil)
			}
			h.close()
		}
	}
}

// A call and its answer are two packets, not four, and what nobody answers is
// acknowledged all the same.
func TestHoldTravelsWithAnswer(t *testing.T) {
	a, b, w := newPair(t, Config{})
	for _, addr := range []netip.Addr{b4, b6} {
		ca, cb := connect(t, a, b, addr)
		var all atomic.Int64
		alone := make(chan struct{}, 1)
		w.setFilter(func(toB bool, packets [][]byte) [][]byte {
			all.Add(int64(len(packets)))
			p := packets[len(packets)-1]
			l3 := 40
			if addr.Is4() {
				l3 = 20
			}
			if !toB && len(p) == l3+int(p[l3+12]>>4)*4 && p[l3+13] == 16 {
				select {
				case alone <- struct{}{}:
				default:
				}
			}
			return packets
		})
		const rounds = 200
		go func() {
			buf := make([]byte, 1)
			for range rounds {
				if _, err := io.ReadFull(cb, buf); err != nil {
					return
				}
				cb.Write(buf)
			}
		}()
		buf := make([]byte, 1)
		for range rounds {
			if _, err := ca.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(ca, buf); err != nil {
				t.Fatal(err)
			}
		}
		// A slow machine may take longer than an acknowledgement waits.
		if n := all.Load(); !raceEnabled && n > 3*rounds {
			t.Errorf("%v: %d packets for %d calls", addr, n, rounds)
		}
		select {
		case <-alone: // the machine was slow
		default:
		}
		if _, err := ca.Write([]byte("no answer")); err != nil {
			t.Fatal(err)
		}
		<-alone
		ca.Close()
		cb.Close()
	}
}

// Who dials and speaks first ends the handshake with what he says, and who listens
// first does not keep the other side waiting.
func TestHoldHandshake(t *testing.T) {
	a, b, w := newPair(t, Config{})
	a.link.hold.wait = time.Hour
	var acks atomic.Int64
	var port atomic.Uint32 // of the listener
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		for _, p := range packets {
			l3 := 40
			if p[0]>>4 == 4 {
				l3 = 20
			}
			if toB && uint32(binary.BigEndian.Uint16(p[l3+2:])) == port.Load() &&
				p[l3+13] == byte(header.TCPFlagAck) && len(p) == l3+int(p[l3+12]>>4)*4 {
				acks.Add(1)
			}
		}
		return packets
	})
	for _, addr := range []netip.Addr{b4, b6} {
		for _, greets := range []bool{false, true} {
			l, err := b.Listen("tcp", netip.AddrPortFrom(addr, 0))
			if err != nil {
				t.Fatal(err)
			}
			acks.Store(0)
			port.Store(uint32(l.addr.Port()))
			served := make(chan error, 1)
			go func() {
				served <- func() error {
					c, err := l.Accept()
					if err != nil {
						return err
					}
					defer c.Close()
					if greets {
						_, err = c.Write([]byte("hello"))
						return err
					}
					_, err = io.ReadFull(c, make([]byte, 5))
					return err
				}()
			}()
			c, err := a.DialTCP(t.Context(), netip.Addr{}, l.addr)
			if err != nil {
				t.Fatal(err)
			}
			if n := acks.Load(); n != 0 {
				t.Errorf("%v, greets %v: the handshake ended with a packet of its own", addr, greets)
			}
			if greets {
				_, err = io.ReadFull(c, make([]byte, 5))
			} else {
				_, err = c.Write([]byte("hello"))
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := <-served; err != nil {
				t.Fatal(err)
			}
			c.Close()
			l.Close()
		}
	}
}

// So many connections at once find room, each whatever the others do.
func TestHoldManyConnections(t *testing.T) {
	const conns = 64
	var h hold
	h.init(1280, func([][]byte) {})
	defer h.close()
	waiting := 0
	for range 2 {
		for port := range uint16(conns) {
			h.keep(say(true, port, header.TCPFlagAck|header.TCPFlagPsh, 100, 500, 10))
		}
	}
	for port := range uint16(conns) {
		if waits, _ := h.keep(say(true, port, header.TCPFlagAck, 110, 500, 0)); waits {
			waiting++
		}
	}
	if waiting < conns*8/10 {
		t.Errorf("%d of %d acknowledgements wait", waiting, conns)
	}
}
