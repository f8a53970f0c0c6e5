package tunnel

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"mesh/identity"
)

// judge is a plain upstream Device, configured by hand, that talks to one of
// our nodes as if over UDP.
type judge struct {
	dev     *device.Device
	tun     *tuntest.ChannelTUN
	private identity.NodePrivate
	key     identity.NodePublic
	v4      netip.Addr
	in      chan []byte
	down    chan struct{}
	target  *node
	addr    netip.AddrPort
	named   bool // the path of the target knows the judge's address
	delay   time.Duration
}

func newJudge(t *testing.T, target *node, psk [32]byte) *judge {
	t.Helper()
	j := &judge{
		tun:     tuntest.NewChannelTUN(),
		private: identity.NewNode(),
		v4:      netip.MustParseAddr("100.64.0.99"),
		in:      make(chan []byte, 1024),
		target:  target,
		addr:    netip.MustParseAddrPort("192.0.2.99:51820"),
	}
	j.key = j.private.Public()
	target.mu.Lock()
	target.netmap[j.key] = Peer{Key: j.key, AllowedIPs: []netip.Prefix{netip.PrefixFrom(j.v4, 32)}}
	target.mu.Unlock()
	j.dev = device.NewDevice(j.tun.TUN(), j, device.NewLogger(device.LogLevelSilent, ""))
	private, public := j.private.Bytes(), target.key.Bytes()
	err := j.dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\npreshared_key=%x\nendpoint=the node\nallowed_ip=0.0.0.0/0\n",
		private[:], public[:], psk[:]))
	if err == nil {
		err = j.dev.Up()
	}
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func (j *judge) close() {
	dropFinalizers(j.dev.LookupPeer(j.target.key.Bytes()))
	j.dev.Close()
}

// dropFinalizers takes the finalizers off the queues of a peer of the Device.
// They run outside the bubble of a test and may not touch its channels, so any
// garbage collection after the peer is gone would end the test binary.
func dropFinalizers(p *device.Peer) {
	queue := reflect.ValueOf(p).Elem().FieldByName("queue")
	for _, name := range []string{"outbound", "inbound"} {
		runtime.SetFinalizer((*byte)(queue.FieldByName(name).UnsafePointer()), nil)
	}
}

// send is the target's Config.Send.
func (j *judge) send(to identity.NodePublic, _ netip.AddrPort, datagrams [][]byte) error {
	if to != j.key {
		return fmt.Errorf("no such node")
	}
	for _, d := range datagrams {
		select {
		case j.in <- append([]byte(nil), d...):
		default:
		}
	}
	return nil
}

func (j *judge) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	down := make(chan struct{})
	j.down = down
	return []conn.ReceiveFunc{func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case <-down:
			return 0, net.ErrClosed
		case d := <-j.in:
			sizes[0], eps[0] = copy(bufs[0], d), judgeEndpoint{}
			return 1, nil
		}
	}}, 1, nil
}

func (j *judge) Close() error {
	if j.down != nil {
		close(j.down)
		j.down = nil
	}
	return nil
}

func (j *judge) Send(bufs [][]byte, _ conn.Endpoint) error {
	src := Source{Addr: j.addr}
	if j.named {
		src.Peer = j.key
	}
	for _, b := range bufs {
		d := [][]byte{append([]byte(nil), b...)}
		if j.delay > 0 {
			time.AfterFunc(j.delay, func() { j.target.t.Receive(src, d) })
		} else {
			j.target.t.Receive(src, d)
		}
	}
	return nil
}

func (j *judge) SetMark(uint32) error                        { return nil }
func (j *judge) BatchSize() int                              { return 1 }
func (j *judge) ParseEndpoint(string) (conn.Endpoint, error) { return judgeEndpoint{}, nil }

type judgeEndpoint struct{}

func (judgeEndpoint) ClearSrc()           {}
func (judgeEndpoint) SrcToString() string { return "" }
func (judgeEndpoint) DstToString() string { return "the node" }
func (judgeEndpoint) DstToBytes() []byte  { return []byte{1} }
func (judgeEndpoint) DstIP() netip.Addr   { return netip.IPv6Loopback() }
func (judgeEndpoint) SrcIP() netip.Addr   { return netip.Addr{} }

// An upstream Device is the peer, as initiator and as responder, with and
// without a pre-shared key, for hours and across an eviction.
func TestJudge(t *testing.T) {
	for _, initiator := range []string{"judge", "node"} {
		for _, psk := range [][32]byte{{}, {1, 2, 3}} {
			t.Run(fmt.Sprintf("%s initiates psk %s", initiator, hex.EncodeToString(psk[:1])), func(t *testing.T) {
				bubble(t, func(t *testing.T, nw *network) {
					var j *judge
					n := nw.add(t, "n", 1, func(c *Config) {
						c.Send = func(to identity.NodePublic, a netip.AddrPort, d [][]byte) error { return j.send(to, a, d) }
						c.PSK = func(identity.NodePublic) [32]byte { return psk }
					})
					j = newJudge(t, n, psk)
					defer j.close()
					toNode := func(text string) {
						t.Helper()
						j.tun.Outbound <- packet(j.v4, n.v4, text)
						synctest.Wait()
						gs := n.take()
						if len(gs) != 1 || gs[0].from != j.key || payload(gs[0].packet) != text {
							t.Fatalf("node got %v, want %q; %+v", gs, text, n.t.Stats())
						}
					}
					toJudge := func(text string) {
						t.Helper()
						if err := n.t.Send(j.key, [][]byte{packet(n.v4, j.v4, text)}); err != nil {
							t.Fatal(err)
						}
						if got := payload(<-j.tun.Inbound); got != text {
							t.Fatalf("judge got %q, want %q", got, text)
						}
					}
					for round := range 2 {
						if initiator == "judge" {
							toNode("first")
							toJudge("second")
						} else {
							toJudge("first")
							toNode("second")
						}
						for i := range unlessRace(200, 40) {
							time.Sleep(47 * time.Second)
							if i%3 == round {
								toNode(fmt.Sprint(i))
							} else {
								toJudge(fmt.Sprint(i))
							}
						}
						time.Sleep(2 * DefaultIdleAfter)
						synctest.Wait()
						if n.t.ActivePeers() != 0 {
							t.Fatal("not evicted")
						}
						// The judge still believes in its session for a while, and
						// keeps its endpoint; what comes then names no session.
						j.named = true
					}
					n.mu.Lock()
					defer n.mu.Unlock()
					if len(n.authenticated) == 0 || n.authenticated[0].Addr != j.addr {
						t.Errorf("authenticated: %v", n.authenticated)
					}
				})
			})
		}
	}
}
