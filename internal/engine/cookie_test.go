package engine

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/crypto/blake2s"

	"mesh/identity"
)

// Strangers that flood a node with initiations for its key are asked for a
// cookie, and only as long as they do.
func TestFloodIsAskedForCookies(t *testing.T) {
	n := newNet()
	h := newHost(t, n, 1)
	h.start(nil)
	key := h.key.Public().Bytes()
	keyed := blake2s.Sum256(append([]byte("mac1----"), key[:]...))
	initiation := make([]byte, 148)
	initiation[0] = 1
	sender := identity.NewNode().Public().Bytes()
	copy(initiation[8:], sender[:])
	mac, err := blake2s.New128(keyed[:])
	if err != nil {
		t.Fatal(err)
	}
	mac.Write(initiation[:116])
	mac.Sum(initiation[:116])
	where := netip.AddrFrom4([4]byte{192, 0, 2, 66})
	pc, err := n.listen(where)(context.Background(), "udp4", "")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	target := net.UDPAddrFromAddrPort(h.node.Endpoints[0])
	pc.WriteTo(initiation, target)
	stop := time.After(20 * time.Second)
	sent := 0
	for {
		select {
		case d := <-pc.(*udpSock).in:
			if len(d.b) != 64 || d.b[0] != 3 {
				t.Fatalf("%d bytes of kind %d", len(d.b), d.b[0])
			}
			if sent < 20 {
				t.Errorf("a cookie after %d initiations", sent)
			}
			return
		case <-stop:
			t.Fatalf("no cookie; %+v", h.e.tunnel.Stats())
		default:
			pc.WriteTo(initiation, target)
			sent++
		}
	}
}
