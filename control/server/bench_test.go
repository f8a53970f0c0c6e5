package server

import (
	"sync"
	"testing"

	"mesh/control/store"
	"mesh/control/wire"
)

// BenchmarkReconnect has 300 nodes that all see each other come back at once
// and report their endpoints, until each knows that all others are online.
func BenchmarkReconnect(b *testing.B) {
	const nodes = 300
	w := newWorld(b, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	all := make([]*machine, nodes)
	for i := range all {
		all[i] = w.machine().join(key)
	}
	b.ResetTimer()
	for b.Loop() {
		var wg sync.WaitGroup
		for _, m := range all {
			wg.Go(func() {
				n := m.poll(nil)
				m.lite(func(r *wire.MapRequest) { r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900} })
				n.until(b, "everybody", func() bool {
					up := 0
					for _, p := range n.peers {
						if online(p) && p.HomeDERP == 900 {
							up++
						}
					}
					return up == nodes-1
				})
				n.cancel()
			})
		}
		wg.Wait()
	}
}
