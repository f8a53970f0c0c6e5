package tunnel

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"mesh/identity"
)

// wired are two tunnels, each of which hands its trains to the other in the
// sender's goroutine.
type wired struct {
	t        [2]*Tunnel
	key      [2]identity.NodePublic
	v4       [2]netip.Addr
	received [2]atomic.Int64
}

func newWired(tb testing.TB) *wired {
	w := new(wired)
	var private [2]identity.NodePrivate
	for i := range private {
		private[i] = identity.NewNode()
		w.key[i] = private[i].Public()
		w.v4[i] = netip.AddrFrom4([4]byte{100, 64, 0, byte(i + 1)})
	}
	var ready sync.WaitGroup // both tunnels are there
	ready.Add(1)
	for i := range w.t {
		other := 1 - i
		peer := Peer{Key: w.key[other], AllowedIPs: []netip.Prefix{netip.PrefixFrom(w.v4[other], 32)}}
		src := Source{Peer: w.key[i]}
		t, err := New(Config{
			Key:    private[i],
			Lookup: func(k identity.NodePublic) (Peer, bool) { return peer, k == peer.Key },
			Send: func(_ identity.NodePublic, _ netip.AddrPort, datagrams [][]byte) error {
				ready.Wait()
				w.t[other].Receive(src, datagrams)
				return nil
			},
			Deliver: func(_ identity.NodePublic, packets [][]byte) { w.received[i].Add(int64(len(packets))) },
		})
		if err != nil {
			tb.Fatal(err)
		}
		w.t[i] = t
		tb.Cleanup(func() { t.Close() })
	}
	ready.Done()
	w.t[0].Send(w.key[1], [][]byte{packet(w.v4[0], w.v4[1], "ready")})
	for w.received[1].Load() == 0 {
		runtime.Gosched()
	}
	return w
}

// burst is a train of packets from one to the other.
func (w *wired) burst(from, packets int) [][]byte {
	out := make([][]byte, packets)
	for i := range out {
		out[i] = packet(w.v4[from], w.v4[1-from], string(make([]byte, MTU-20)))
	}
	return out
}

// Trains are sealed, opened and delivered without any allocation.
func TestNoAllocation(t *testing.T) {
	if testing.CoverMode() != "" || raceEnabled {
		t.Skip("the race detector empties pools at random")
	}
	w := newWired(t)
	for _, packets := range []int{1, 16, 64} {
		for from := range 2 {
			burst := w.burst(from, packets)
			run := func() { w.t[from].Send(w.key[1-from], burst) }
			run()
			if n := testing.AllocsPerRun(200, run); n >= 1 {
				t.Errorf("%.1f allocations for %d packets from %d", n, packets, from)
			}
		}
	}
}

// BenchmarkBothWays seals and opens packets of 1280 bytes, ours and by upstream's
// Device, in memory. The Device gets and gives batches of the same size; what it
// cannot do without is that its goroutines take over from each other. An op is a
// packet.
func BenchmarkBothWays(b *testing.B) {
	for _, packets := range []int{1, 16, 50} {
		b.Run(fmt.Sprintf("ours/%d", packets), func(b *testing.B) {
			w := newWired(b)
			burst := w.burst(0, packets)
			begin := w.received[1].Load()
			b.SetBytes(MTU)
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime()
			for i := 0; i < b.N; i += packets {
				w.t[0].Send(w.key[1], burst)
			}
			report(b, cpu, w.received[1].Load()-begin)
		})
		b.Run(fmt.Sprintf("Device/%d", packets), func(b *testing.B) {
			x, y := deviceCouple(b)
			b.SetBytes(MTU)
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime()
			begin := y.received.Load()
			sent := begin
			for i := 0; i < b.N; i += packets {
				x.out <- packets
				sent += int64(packets)
				for sent-y.received.Load() > 512 { // its queues drop beyond
					<-y.moved
				}
			}
			for y.received.Load() < sent {
				<-y.moved
			}
			report(b, cpu, y.received.Load()-begin)
		})
	}
}

// BenchmarkContention has senders of one tunnel share a session.
func BenchmarkContention(b *testing.B) {
	w := newWired(b)
	burst := w.burst(0, 16)
	b.SetBytes(MTU * 16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w.t[0].Send(w.key[1], burst)
		}
	})
}

func report(b *testing.B, cpu float64, packets int64) {
	b.StopTimer()
	b.ReportMetric((cpuTime()-cpu)*1e9/float64(packets)/MTU, "cpu-s/GB")
}

// batchTUN is a TUN of a Device that gives as many packets as it is told and
// counts those it gets.
type batchTUN struct {
	packet   []byte
	out      chan int
	events   chan tun.Event
	closed   chan struct{}
	received atomic.Int64
	moved    chan struct{} // capacity 1: received has changed
}

func (*batchTUN) File() *os.File             { return nil }
func (*batchTUN) MTU() (int, error)          { return MTU, nil }
func (*batchTUN) Name() (string, error)      { return "batch", nil }
func (*batchTUN) BatchSize() int             { return conn.IdealBatchSize }
func (d *batchTUN) Events() <-chan tun.Event { return d.events }

func (d *batchTUN) Close() error {
	close(d.closed)
	close(d.events)
	return nil
}

func (d *batchTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case n := <-d.out:
		for i := range n {
			sizes[i] = copy(bufs[i][offset:], d.packet)
		}
		return n, nil
	case <-d.closed:
		return 0, os.ErrClosed
	}
}

func (d *batchTUN) Write(bufs [][]byte, _ int) (int, error) {
	d.received.Add(int64(len(bufs)))
	select {
	case d.moved <- struct{}{}:
	default:
	}
	return len(bufs), nil
}

// batchBind hands batches to the other Device.
type batchBind struct {
	in    chan [][]byte
	free  chan [][]byte
	other *batchBind
	down  chan struct{}
}

func newBatchBind() *batchBind {
	b := &batchBind{in: make(chan [][]byte, 64), free: make(chan [][]byte, 65)}
	return b
}

func (b *batchBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	down := make(chan struct{})
	b.down = down
	return []conn.ReceiveFunc{func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case <-down:
			return 0, net.ErrClosed
		case batch := <-b.in:
			for i, d := range batch {
				sizes[i], eps[i] = copy(bufs[i], d), judgeEndpoint{}
			}
			select {
			case b.free <- batch:
			default:
			}
			return len(batch), nil
		}
	}}, 1, nil
}

func (b *batchBind) Close() error {
	if b.down != nil {
		close(b.down)
		b.down = nil
	}
	return nil
}

func (b *batchBind) Send(bufs [][]byte, _ conn.Endpoint) error {
	var batch [][]byte
	select {
	case batch = <-b.other.free:
	default:
	}
	batch = batch[:0]
	for _, d := range bufs {
		if n := len(batch); n < cap(batch) {
			batch = batch[:n+1]
			batch[n] = append(batch[n][:0], d...)
		} else {
			batch = append(batch, append([]byte(nil), d...))
		}
	}
	b.other.in <- batch
	return nil
}

func (b *batchBind) SetMark(uint32) error                        { return nil }
func (b *batchBind) BatchSize() int                              { return conn.IdealBatchSize }
func (b *batchBind) ParseEndpoint(string) (conn.Endpoint, error) { return judgeEndpoint{}, nil }

// deviceCouple are two Devices with a session.
func deviceCouple(b *testing.B) (x, y *batchTUN) {
	private := [2]identity.NodePrivate{identity.NewNode(), identity.NewNode()}
	v4 := [2]netip.Addr{netip.AddrFrom4([4]byte{100, 64, 0, 1}), netip.AddrFrom4([4]byte{100, 64, 0, 2})}
	var tuns [2]*batchTUN
	binds := [2]*batchBind{newBatchBind(), newBatchBind()}
	var devices [2]*device.Device
	for i := range tuns {
		binds[i].other = binds[1-i]
		tuns[i] = &batchTUN{packet: packet(v4[i], v4[1-i], string(make([]byte, MTU-20))), out: make(chan int), events: make(chan tun.Event, 1), closed: make(chan struct{}), moved: make(chan struct{}, 1)}
		devices[i] = device.NewDevice(tuns[i], binds[i], device.NewLogger(device.LogLevelSilent, ""))
		own, theirs := private[i].Bytes(), private[1-i].Public().Bytes()
		if err := devices[i].IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\nendpoint=x\nallowed_ip=0.0.0.0/0\n", own[:], theirs[:])); err != nil {
			b.Fatal(err)
		}
	}
	for _, d := range devices {
		if err := d.Up(); err != nil {
			b.Fatal(err)
		}
	}
	b.Cleanup(func() {
		for _, d := range devices {
			d.Close()
		}
	})
	tuns[0].out <- 1
	for tuns[1].received.Load() == 0 {
		runtime.Gosched()
	}
	return tuns[0], tuns[1]
}
