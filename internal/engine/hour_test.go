package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"mesh/internal/filter"
)

// Goal 11: an hour without a word from control. What was begun goes on, over
// some thirty handshakes and the idle removal of peers; what begins is allowed
// and denied as before.
func TestAnHourWithoutControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		a.link.arrived, b.link.arrived = make(chan []byte, 100), make(chan []byte, 100)
		a.link.told = make(chan flow, 10)
		began := time.Now()
		client, server := port(a.four, 1000), port(b.four, 80)
		again := 0
		// pass sends a packet as TCP would: once more after each second of
		// silence. What arrives late or twice is no harm.
		pass := func(from, to *host, p []byte) {
			t.Helper()
			for range 10 {
				from.e.Out([][]byte{p})
				patience := time.After(time.Second)
				for waiting := true; waiting; {
					select {
					case got := <-to.link.arrived:
						if string(got) == string(p) {
							return
						}
					case <-patience:
						waiting = false
					}
				}
				again++
			}
			t.Fatalf("%x does not get through, %v after the start", p, time.Since(began))
		}
		pass(a, b, packet(tcp, client, server, filter.TCPSyn))
		pass(b, a, packet(tcp, server, client, filter.TCPSyn|filter.TCPAck))
		pass(a, b, packet(tcp, client, server, filter.TCPAck))
		for time.Since(began) < 30*time.Minute {
			pass(a, b, packet(tcp, client, server, filter.TCPAck|filter.TCPPsh))
			pass(b, a, packet(tcp, server, client, filter.TCPAck))
			time.Sleep(3 * time.Second)
		}
		// Silence long enough for both to let go of each other, then again.
		time.Sleep(15 * time.Minute)
		if n := a.e.tunnel.ActivePeers() + b.e.tunnel.ActivePeers(); n != 0 {
			t.Errorf("%d peers are configured after a quarter of an hour of silence", n)
		}
		for time.Since(began) < time.Hour {
			pass(b, a, packet(tcp, server, client, filter.TCPAck|filter.TCPPsh))
			pass(a, b, packet(tcp, client, server, filter.TCPAck))
			time.Sleep(3 * time.Second)
		}
		// The first contact of all and the one after the silence may need that.
		if again > 10 {
			t.Errorf("%d packets had to be sent again", again)
		}
		if _, peer, _, ok := b.e.Admitted(tcp, server, client); !ok || peer.Key != a.key.Public() {
			t.Error("the flow is no longer known")
		}
		pass(a, b, packet(tcp, port(a.four, 2000), server, filter.TCPSyn))
		a.e.Out([][]byte{packet(tcp, client, port(b.four, 81), filter.TCPSyn)})
		if f := <-a.link.told; f.remote != port(b.four, 81) {
			t.Errorf("rejected %v", f)
		}
	})
}
