package path

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// A peer with a direct path and a relay begins a handshake by every way; the
// answer takes the way that the handshake came first, and the other one later.
func TestAnswerGoesOneWayFirst(t *testing.T) {
	for _, byRelay := range []bool{false, true} {
		name := map[bool]string{false: "by UDP", true: "by relay"}[byRelay]
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n, a, b := pair(t)
				a.knows(b.peer(1))
				b.knows(a.peer(1))
				a.send(t, b, "hello")
				b.send(t, a, "hello")
				settle(2 * time.Second)
				if st := a.Status(b.key()); st.Direct != b.addr {
					t.Fatalf("not direct: %+v", st)
				}
				initiation := make([]byte, initiationLen)
				initiation[0] = 1
				if byRelay {
					n.relays[1].inject(a.key(), b.key(), initiation)
				} else {
					b.fromUDP(a.addr, [][]byte{initiation})
				}
				settle(50 * time.Millisecond)
				a.take()
				answer := make([]byte, responseLen)
				answer[0] = 2
				if err := b.Send(a.key(), netip.AddrPort{}, [][]byte{answer}); err != nil {
					t.Fatal(err)
				}
				ways := func() (udp, relay int) {
					synctest.Wait()
					for _, r := range a.take() {
						if len(r.data) != responseLen || r.data[0] != 2 {
							continue
						}
						if r.src.Region != 0 {
							relay++
						} else {
							udp++
						}
					}
					return udp, relay
				}
				time.Sleep(answerLag / 2)
				if udp, relay := ways(); udp+relay != 1 || (relay == 1) != byRelay {
					t.Errorf("at first %d by UDP, %d by relay", udp, relay)
				}
				time.Sleep(answerLag)
				if udp, relay := ways(); udp+relay != 1 || (relay == 1) == byRelay {
					t.Errorf("later %d by UDP, %d by relay", udp, relay)
				}
			})
		})
	}
}
