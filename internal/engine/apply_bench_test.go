package engine

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

// large is the first message of a stream in a mesh of that many peers.
func large(b *testing.B, h *host, peers int) *wire.MapResponse {
	b.Helper()
	r := &wire.MapResponse{
		Node: h.node, MeshPolicy: 1,
		PacketFilters: map[string][]wire.FilterRule{"base": {allow("*", "*", 80)}},
	}
	for i := range peers {
		n := wireNode(100+i, identity.NewNode().Public())
		n.DiscoKey = identity.NewDisco().Public()
		n.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 41641)}
		r.Peers = append(r.Peers, n)
	}
	return r
}

// BenchmarkApply makes a first map and puts it in force.
func BenchmarkApply(b *testing.B) {
	for _, peers := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(peers), func(b *testing.B) {
			h := newHost(b, newNet(), 1)
			r := large(b, h, peers)
			b.ReportAllocs()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			for b.Loop() {
				m, d, err := netmap.Apply(nil, r)
				if err == nil {
					err = h.e.Apply(m, d)
				}
				if err != nil || m.NumPeers() != peers {
					b.Fatal(err)
				}
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/1e6, "live-MB")
			runtime.KeepAlive(r)
		})
	}
}

// BenchmarkApplyDelta puts a change of one peer of many in force: its relay, all
// of it, or that it left and came back.
func BenchmarkApplyDelta(b *testing.B) {
	for _, peers := range []int{1000, 10_000} {
		h := newHost(b, newNet(), 1)
		first := large(b, h, peers)
		m, d, err := netmap.Apply(nil, first)
		if err == nil {
			err = h.e.Apply(m, d)
		}
		if err != nil {
			b.Fatal(err)
		}
		one := first.Peers[peers/2]
		for name, change := range map[string]func(i int) *wire.MapResponse{
			"patch": func(i int) *wire.MapResponse {
				return &wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: one.ID, DERPRegion: 1 + i%9}}}
			},
			"replace": func(i int) *wire.MapResponse {
				n := *one
				n.Key = identity.NewNode().Public()
				return &wire.MapResponse{PeersChanged: []*wire.Node{&n}}
			},
			"leave and join": func(i int) *wire.MapResponse {
				if i%2 == 0 {
					return &wire.MapResponse{PeersRemoved: []wire.NodeID{one.ID}}
				}
				return &wire.MapResponse{PeersChanged: []*wire.Node{one}}
			},
		} {
			b.Run(fmt.Sprintf("%d %s", peers, name), func(b *testing.B) {
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					next, d, err := netmap.Apply(m, change(i))
					if err == nil {
						err = h.e.Apply(next, d)
					}
					if err != nil {
						b.Fatal(err)
					}
					m = next
				}
			})
		}
	}
}
