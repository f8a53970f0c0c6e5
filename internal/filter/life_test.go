package filter

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Random packets, swaps and moves: nothing gets in that neither a rule nor a
// flow of ours allows, and the table stays sound.
func TestRandomLife(t *testing.T) {
	for seed := range uint64(60) {
		w := world{rand.New(rand.NewPCG(seed, 2))}
		f, k := clocked(t, Config{MaxFlows: 40, MaxFlowsPerPeer: 10})
		peers := []identity.NodePublic{alice, bob, identity.NodePublicFrom([32]byte{3})}
		var rules []wire.FilterRule
		type pair struct {
			proto         uint8
			local, remote netip.AddrPort
			peer          identity.NodePublic
		}
		begun := make(map[pair]bool) // flows that we ever began
		for range 1500 {
			k.advance(time.Duration(w.IntN(int(20 * time.Second))))
			switch w.IntN(40) {
			case 0:
				rules = w.rules()
				f.Swap(compile(t, rules...))
				for _, e := range f.flows.flows {
					local, remote := e.key.addrs()
					if e.inbound && e.state != stateRefused &&
						naive(rules, query{e.key.proto, remote.Addr(), local.Addr(), local.Port(), e.owner.peer}) < 0 {
						t.Fatalf("seed %d: %+v survived the swap", seed, e.public())
					}
				}
				continue
			case 1:
				f.Forget(peers[w.IntN(3)])
				continue
			case 2:
				if seed%2 == 0 {
					f.Rekey(peers[w.IntN(3)], peers[w.IntN(3)])
					begun = nil // flows changed hands: the rest checks the table only
				}
				continue
			}
			peer := peers[w.IntN(3)]
			proto := []uint8{ProtoTCP, ProtoUDP}[w.IntN(2)]
			us := netip.AddrPortFrom(netip.MustParseAddr("100.64.0.1"), []uint16{22, 80}[w.IntN(2)])
			them := netip.AddrPortFrom(w.addr(false), uint16(1+w.IntN(3)))
			flags := []uint8{TCPSyn, TCPSyn | TCPAck, TCPAck, TCPAck | TCPFin, TCPRst}[w.IntN(5)]
			if w.IntN(3) == 0 {
				f.Out(mk{proto: proto, src: us.String(), dst: them.String(), flags: flags}.packet(t), peer)
				if begun != nil && (proto == ProtoUDP || flags == TCPSyn) {
					begun[pair{proto, us, them, peer}] = true
				}
				continue
			}
			v := f.In(mk{proto: proto, src: them.String(), dst: us.String(), flags: flags}.packet(t), peer)
			allowed := naive(rules, query{proto, them.Addr(), us.Addr(), us.Port(), peer}) >= 0
			if allowed && v.Action != Accept {
				t.Fatalf("seed %d: allowed, but %v", seed, v)
			}
			if v.Action == Accept && !allowed && begun != nil && !begun[pair{proto, us, them, peer}] {
				t.Fatalf("seed %d: %v lets in what nothing allows", seed, v)
			}
		}
		checkTable(t, f)
	}
}

// Widened and narrowed again a thousand times while packets arrive: nothing
// survives the last state (negative test 60).
func TestSwapRace(t *testing.T) {
	f := newFilter(t)
	wide, narrow := compile(t, allow("*", "*", 22, 22)), compile(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			for port := 1; ; port = port%5000 + 1 {
				select {
				case <-stop:
					return
				default:
				}
				src := fmt.Sprintf("100.64.0.%d:%d", 2+i, port)
				f.In(mk{proto: ProtoUDP, src: src, dst: us}.packet(t), alice)
				f.Out(mk{proto: ProtoTCP, src: us, dst: src, flags: TCPAck}.packet(t), alice)
			}
		})
	}
	for range 1000 {
		f.Swap(wide)
		f.Swap(narrow)
		f.mu.Lock()
		for _, e := range f.flows.flows {
			if e.state != stateRefused {
				t.Errorf("%+v survived", e.public())
			}
		}
		f.mu.Unlock()
	}
	close(stop)
	wg.Wait()
	checkTable(t, f)
}
