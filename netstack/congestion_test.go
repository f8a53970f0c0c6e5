package netstack

import (
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// A short way is one for Reno, at both ends, a long one is for CUBIC.
func TestControl(t *testing.T) {
	for want, delay := range map[string]time.Duration{"reno": 0, "cubic": 2 * longTrip} {
		t.Run(want, func(t *testing.T) {
			a, b, w := newPair(t, Config{})
			if delay > 0 {
				far(t, w, b, delay)
			}
			ca, cb := connect(t, a, b, b4)
			for name, c := range map[string]*Conn{"dialled": ca, "accepted": cb} {
				var got tcpip.CongestionControlOption
				var info tcpip.TCPInfoOption
				if err := c.ep.GetSockOpt(&got); err != nil {
					t.Fatal(err)
				}
				if err := c.ep.GetSockOpt(&info); err != nil {
					t.Fatal(err)
				}
				if busy := delay == 0 && info.RTT >= longTrip; string(got) != want && !busy {
					t.Errorf("%s: %q after a round trip of %v", name, got, info.RTT)
				}
			}
		})
	}
}
