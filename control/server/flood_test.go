package server

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mesh/control/store"
)

// A 14: one address asks to register as often as it can, by new connections and by
// old ones. It hears 429, and nobody at another address does or fails. How much
// longer their joins take is logged: the same machine makes flood and joins.
func TestRegistrationFlood_A14(t *testing.T) {
	w := newWorld(t, nil)
	key := w.key(store.Key{Reusable: true})
	elsewhere := *w
	elsewhere.dial = func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext(ctx, "tcp", w.addr)
	}
	if c, err := elsewhere.dial(t.Context()); err != nil {
		t.Skip("this system has one loopback address: ", err)
	} else {
		c.Close()
	}
	joins := func(n int) (took []time.Duration) {
		for range n {
			began := time.Now()
			m := elsewhere.machine().join(key)
			took = append(took, time.Since(began))
			m.close()
		}
		slices.Sort(took)
		return took
	}
	const rounds = 40
	joins(rounds / 10)
	before := joins(rounds)

	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var asked, refused atomic.Int64
	for i := range 32 {
		m := w.machine()
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if i%4 == 0 && n%64 == 63 {
					m.close()
					m = w.machine()
				}
				_, err := m.register(m.registerRequest("mesh-auth-1-nonsense"))
				asked.Add(1)
				if err != nil && strings.Contains(err.Error(), "429") {
					refused.Add(1)
				}
			}
			m.close()
		})
	}
	for refused.Load() == 0 {
		if joins(1); t.Failed() {
			break
		}
	}
	began, from := time.Now(), asked.Load()
	during := joins(rounds)
	rate := float64(asked.Load()-from) / time.Since(began).Seconds()
	stop()
	wg.Wait()
	if refused.Load() == 0 {
		t.Errorf("of %d requests none was refused", asked.Load())
	}
	at := func(d []time.Duration, percent int) time.Duration {
		return d[(len(d)-1)*percent/100].Round(10 * time.Microsecond)
	}
	t.Logf("joins from elsewhere: p50 %v, p99 %v; with %.0f requests a second from one address: p50 %v, p99 %v",
		at(before, 50), at(before, 99), rate, at(during, 50), at(during, 99))
}
