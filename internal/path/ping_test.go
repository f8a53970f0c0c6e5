package path

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"mesh/identity"
)

func TestPingBecomesDirect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		ping := func() (out []string) {
			err := a.Ping(t.Context(), b.key(), func(g Pong) { out = append(out, fmt.Sprint(g, " ", g.Latency)) })
			if err != nil {
				out = append(out, err.Error())
			}
			return out
		}
		if got := ping(); len(got) != 2 || got[1] != "direct 192.0.2.2:41641 2ms" && got[0] != "direct 192.0.2.2:41641 2ms" {
			t.Errorf("%q", got)
		}
		settle(100 * time.Millisecond)
		if st := a.Status(b.key()); !st.Trusted || st.RelayLatency != 0 && st.RelayLatency > time.Second || st.Size != fullDatagram {
			t.Errorf("%+v", st)
		}
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		settle(5 * time.Second)
		if got := ping(); len(got) != 1 || got[0] != "relay 1 0s" {
			t.Errorf("UDP blocked: %q", got)
		}
		settle(5 * time.Second)
		if st := a.Status(b.key()); st.Trusted || st.Direct.IsValid() || st.Region != 1 || st.Why != "path silent" {
			t.Errorf("UDP blocked: %+v", st)
		}
		n.relays[1].setDown(true)
		began := time.Now()
		err := a.Ping(t.Context(), b.key(), func(g Pong) { t.Error(g) })
		if !errors.Is(err, ErrNoAnswer) || time.Since(began) != pingTimeout {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := a.Ping(ctx, b.key(), func(Pong) {}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if err := a.Ping(t.Context(), identity.NewNode().Public(), nil); !errors.Is(err, ErrUnknownPeer) {
			t.Error(err)
		}
		a.Path.mu.Lock()
		defer a.Path.mu.Unlock()
		for _, pe := range a.peers.all() {
			if len(pe.pingers) != 0 {
				t.Error("pingers kept")
			}
		}
	})
}
