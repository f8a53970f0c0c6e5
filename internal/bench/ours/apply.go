package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/bench/load"
	"mesh/internal/engine"
	"mesh/internal/netmap"
)

// noStack is the packet side of a stack that has no connections.
type noStack struct{}

func (noStack) In([][]byte)                                                       {}
func (noStack) SetAddrs([]netip.Addr) error                                       { return nil }
func (noStack) Reject(uint8, netip.AddrPort, netip.AddrPort, error) bool          { return false }
func (noStack) Abort(func(uint8, netip.AddrPort, netip.AddrPort) bool, error) int { return 0 }
func (noStack) AbortFlow(uint8, netip.AddrPort, netip.AddrPort, error) bool       { return false }

// peer invents a node.
func peer(id int) *wire.Node {
	var b [64]byte
	rand.Read(b[:])
	n := &wire.Node{
		ID: wire.NodeID(id), StableID: fmt.Sprintf("n%dCNTRL", id), Name: fmt.Sprintf("agent%d.mesh.internal.", id), User: 1,
		Addresses:  []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64 + byte(id>>16), byte(id >> 8), byte(id)}), 32)},
		Endpoints:  []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(id >> 16), byte(id >> 8), byte(id)}), 41641)},
		HomeDERP:   1,
		KeyExpiry:  time.Now().Add(24 * time.Hour),
		Hostinfo:   &wire.Hostinfo{OS: "linux", Hostname: fmt.Sprintf("agent%d", id)},
		Tags:       []string{"tag:agent"},
		AllowedIPs: nil, MachineAuthorized: true,
	}
	n.Key, _ = identity.ParseNodePublic("nodekey:" + hex.EncodeToString(b[:32]))
	n.DiscoKey, _ = identity.ParseDiscoPublic("discokey:" + hex.EncodeToString(b[32:]))
	return n
}

func liveHeap() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// apply makes maps out of messages and puts them in force, as a node does once a
// message is decoded: a first one of so many peers, then changes of one peer.
func apply(peers int) (out load.Applied, err error) {
	eng, err := engine.New(engine.Config{Key: identity.NewNode(), Disco: identity.NewDisco(), Link: noStack{}, RelayOnly: true})
	if err != nil {
		return out, err
	}
	defer eng.Close()
	r := &wire.MapResponse{Node: peer(1 << 20), PacketFilters: map[string][]wire.FilterRule{"base": {
		{SrcIPs: []string{"*"}, DstPorts: []wire.NetPortRange{{IP: "*", Ports: wire.AllPorts}}},
	}}}
	for i := range peers {
		r.Peers = append(r.Peers, peer(i+1))
	}
	var m *netmap.Map
	follow := func(r *wire.MapResponse) (took time.Duration, err error) {
		begin := time.Now()
		next, d, err := netmap.Apply(m, r)
		if err == nil {
			next.Expire(begin) // a session looks for keys that have expired with every change
			next.NextExpiry(begin)
			err = eng.Apply(next, d)
		}
		m = next
		return time.Since(begin), err
	}
	first, err := follow(r)
	if err != nil {
		return out, err
	}
	out.First = first.Seconds()
	var all []time.Duration
	for i := range 200 {
		n := peer(peers / 2)
		change := &wire.MapResponse{PeersChanged: []*wire.Node{n}}
		if i%2 == 1 {
			change = &wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: n.ID, DERPRegion: 2 + i%5}}}
		}
		took, err := follow(change)
		if err != nil {
			return out, err
		}
		all = append(all, took)
	}
	slices.Sort(all)
	out.Delta = all[len(all)/2].Seconds()
	with := liveHeap()
	r, m = nil, nil
	if err := eng.Apply(new(netmap.Map), netmap.Delta{Full: true}); err != nil {
		return out, err
	}
	out.Heap = with - liveHeap()
	return out, nil
}
