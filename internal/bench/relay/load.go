package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"mesh/derp"
	"mesh/identity"
)

// scenario is a pattern of traffic between clients of one relay.
type scenario struct {
	name    string
	clients int
	// fan makes each client send to all others in turn, a run of so many frames
	// to each; 0 = clients talk in pairs, both ways.
	fan int
	// window is how many frames of a flow may be under way; 0 = as many as TCP takes.
	window int
	size   int // of packets
	// pause is between bursts of window frames; 0 = as fast as it goes.
	pause time.Duration
}

var scenarios = []scenario{
	{name: "1 pair, flood", clients: 2, size: 1300},
	{name: "1 pair, window 32", clients: 2, size: 1300, window: 32},
	{name: "1 pair, window 256", clients: 2, size: 1300, window: 256},
	{name: "8 pairs, flood", clients: 16, size: 1300},
	{name: "8 pairs, window 64", clients: 16, size: 1300, window: 64},
	{name: "16 clients to all, runs of 1", clients: 16, fan: 1, size: 1300, window: 24},
	{name: "16 clients to all, runs of 16", clients: 16, fan: 16, size: 1300, window: 24},
	{name: "200 pairs, 20 frames each 100 ms", clients: 400, size: 1300, window: 20, pause: 100 * time.Millisecond},
	{name: "1 pair, 100 bytes, window 256", clients: 2, size: 100, window: 256},
}

type result struct {
	delivered, lost int64
	took, cpu       time.Duration
}

func (r result) perCPU() float64 { return float64(r.delivered) / r.cpu.Seconds() }

// noise is what packets are made of: their content is a window of it that their
// flow and number choose.
var noise = func() []byte {
	b := make([]byte, 1<<17)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}()

const stampLen = 16 // flow and number in front of a packet

func content(flow, seq uint64, size int) []byte {
	at := (flow*7919 + seq*31) & (1<<16 - 1)
	return noise[at : at+uint64(size-stampLen)]
}

// flow is what one client sends to another.
type flow struct {
	id       uint64
	src, dst [identity.KeyLen]byte
	sent     uint64 // of the sender

	next      atomic.Uint64 // expected by the receiver
	delivered atomic.Int64
	lost      atomic.Int64
	gaveUp    atomic.Bool   // the sender moved next once, since the last of its frames were lost
	moved     chan struct{} // tells the sender that something arrived
}

type client struct {
	nc   net.Conn
	key  [identity.KeyLen]byte
	out  []*flow
	byID map[uint64]*flow // those that arrive
}

func connect(addr string, secure bool) *client {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		log.Fatal(err)
	}
	if secure {
		nc = tls.Client(nc, &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	}
	io.WriteString(nc, "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n")
	key := identity.NewNode()
	conn := derp.NewConn(nc, nil, derp.ConnConfig{})
	f, err := conn.ReadFrame()
	if err != nil {
		log.Fatal(err)
	}
	relay, err := derp.ParseServerKey(f.Payload)
	if err != nil {
		log.Fatal(err)
	}
	conn.WriteFrame(derp.FrameClientInfo, derp.SealClientInfo(key, relay, derp.ClientInfo{Version: 2, CanAckPings: true}))
	if f, err = conn.ReadFrame(); err != nil || f.Type != derp.FrameServerInfo {
		log.Fatal(f, err)
	}
	return &client{nc: nc, key: key.Public().Bytes(), byID: make(map[uint64]*flow)}
}

// run loads a relay with the scenario and measures it.
func (sc scenario) run(p *process, length time.Duration) result {
	clients := make([]*client, sc.clients)
	for i := range clients {
		clients[i] = connect(p.addr, p.secure)
	}
	var flows []*flow
	add := func(a, b *client) {
		f := &flow{id: uint64(len(flows)), src: a.key, dst: b.key, moved: make(chan struct{}, 1)}
		flows = append(flows, f)
		a.out = append(a.out, f)
		b.byID[f.id] = f
	}
	for i, a := range clients {
		if sc.fan == 0 {
			add(a, clients[i^1])
			continue
		}
		for j := range clients {
			if j != i {
				add(a, clients[(i+j)%len(clients)])
			}
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() { c.receive(sc.size) })
		wg.Go(func() { sc.send(c, stop) })
	}
	sum := func() (r result) {
		for _, f := range flows {
			r.delivered += f.delivered.Load()
			r.lost += f.lost.Load()
		}
		return r
	}
	time.Sleep(length / 4) // until all are at it
	cpu, began, before := p.cpu(), time.Now(), sum()
	time.Sleep(length)
	after := sum()
	r := result{after.delivered - before.delivered, after.lost - before.lost, time.Since(began), p.cpu() - cpu}
	close(stop)
	for _, c := range clients {
		c.nc.Close()
	}
	wg.Wait()
	return r
}

// send sends frames of all the client's flows in turn.
func (sc scenario) send(c *client, stop chan struct{}) {
	const burst = 64
	buf := make([]byte, 0, burst*(derp.FrameHeaderLen+identity.KeyLen+sc.size))
	timer := time.NewTimer(time.Hour)
	for at := 0; ; at++ {
		f := c.out[at%len(c.out)]
		n := burst
		if sc.fan > 0 {
			n = sc.fan
		}
		if sc.window > 0 {
			free := sc.window - int(f.sent-f.next.Load())
			for sc.pause == 0 && free <= 0 {
				if len(buf) > 0 {
					if _, err := c.nc.Write(buf); err != nil {
						return
					}
					buf = buf[:0]
				}
				timer.Reset(20 * time.Millisecond)
				select {
				case <-stop:
					return
				case <-f.moved:
				case <-timer.C: // the end of the flow was lost
					f.gaveUp.Store(true)
					f.next.Store(f.sent)
				}
				free = sc.window - int(f.sent-f.next.Load())
			}
			if sc.pause > 0 {
				free = sc.window
			}
			n = min(n, free)
		}
		for range n {
			var stamp [stampLen]byte
			binary.LittleEndian.PutUint64(stamp[:], f.id)
			binary.LittleEndian.PutUint64(stamp[8:], f.sent)
			buf = derp.AppendFrame(buf, derp.FrameSendPacket, f.dst[:], stamp[:], content(f.id, f.sent, sc.size))
			f.sent++
		}
		if len(buf) >= cap(buf)/2 || (at+1)%len(c.out) == 0 {
			if _, err := c.nc.Write(buf); err != nil {
				return
			}
			buf = buf[:0]
		}
		if sc.pause > 0 {
			timer.Reset(sc.pause)
			select {
			case <-stop:
				return
			case <-timer.C:
			}
		}
	}
}

// receive checks all that arrives.
func (c *client) receive(size int) {
	buf := make([]byte, 256<<10)
	have := 0
	for {
		n, err := c.nc.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		b := buf[:have]
		for len(b) >= derp.FrameHeaderLen {
			n := derp.FrameHeaderLen + int(binary.BigEndian.Uint32(b[1:]))
			if len(b) < n {
				break
			}
			if b[0] == byte(derp.FrameRecvPacket) {
				if err := c.check(b[derp.FrameHeaderLen:n], size); err != nil {
					log.Fatalf("the relay delivered something else than was sent: %v", err)
				}
			}
			b = b[n:]
		}
		have = copy(buf, b)
	}
}

func (c *client) check(payload []byte, size int) error {
	if len(payload) != identity.KeyLen+size {
		return fmt.Errorf("%d bytes", len(payload))
	}
	packet := payload[identity.KeyLen:]
	seq := binary.LittleEndian.Uint64(packet[8:])
	f := c.byID[binary.LittleEndian.Uint64(packet)]
	switch {
	case f == nil:
		return fmt.Errorf("a packet for somebody else")
	case !bytes.Equal(payload[:identity.KeyLen], f.src[:]):
		return fmt.Errorf("another sender")
	case !bytes.Equal(packet[stampLen:], content(f.id, seq, size)):
		return fmt.Errorf("changed bytes")
	}
	next := f.next.Load()
	if seq < next {
		if f.gaveUp.Load() {
			return nil // late, not out of order
		}
		return fmt.Errorf("number %d of a flow where %d is due", seq, next)
	}
	f.lost.Add(int64(seq - next))
	f.next.Store(seq + 1)
	f.delivered.Add(1)
	select {
	case f.moved <- struct{}{}:
	default:
	}
	return nil
}
