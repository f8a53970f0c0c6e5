package server

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

// known is what a node knows after a message, as text that can be kept.
type known struct {
	Self   *wire.Node
	Peers  map[wire.NodeID]*wire.Node
	Filter []wire.FilterRule
	Users  map[wire.UserID]wire.UserProfile
	Policy int64
}

func (n *netmap) save() []byte {
	b, _ := json.Marshal(known{n.self, n.peers, n.filter, n.users, n.policy})
	return b
}

func (n *netmap) restore(t *testing.T, b []byte) {
	var k known
	if err := json.Unmarshal(b, &k); err != nil {
		t.Fatal(err)
	}
	n.self, n.peers, n.filter, n.users, n.policy = k.Self, k.Peers, k.Filter, k.Users, k.Policy
}

// resumable makes a poll one of a process that resumes.
func resumable(handle string, seq int64) func(*wire.MapRequest) {
	return func(r *wire.MapRequest) {
		r.MeshInstance, r.MapSessionHandle, r.MapSessionSeq = "process", handle, seq
	}
}

// A node that resumes after random changes, from any of the messages that it got
// last, knows the same as one that gets a complete map.
func TestResumeIsExact(t *testing.T) {
	w := newWorld(t, nil)
	rnd := rand.New(rand.NewPCG(7, uint64(len(t.Name()))))
	ctx := context.Background()
	policies := []string{
		`{"tagOwners": {"tag:a": [], "tag:b": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`,
		`{"tagOwners": {"tag:a": [], "tag:b": []}, "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:22", "tag:b:80"]}]}`,
		`{"tagOwners": {"tag:a": [], "tag:b": []}, "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:22"]}, {"action": "accept", "src": ["tag:b"], "dst": ["*:443"]}]}`,
	}
	setPolicy := func(i int) {
		if _, err := w.s.SetPolicy(ctx, "test", policies[i], -1); err != nil {
			t.Fatal(err)
		}
	}
	setPolicy(0)
	keys := []string{w.key(store.Key{Reusable: true, Tags: []string{"tag:a"}}), w.key(store.Key{Reusable: true, Tags: []string{"tag:b"}})}
	x := w.machine().join(keys[0])
	var others []*machine
	more := func() {
		m := w.machine().join(keys[rnd.IntN(2)])
		m.poll(nil)
		others = append(others, m)
	}
	for range 6 {
		more()
	}
	change := func() {
		switch i := rnd.IntN(len(others)); rnd.IntN(8) {
		case 0:
			setPolicy(rnd.IntN(len(policies)))
		case 1:
			more()
		case 2:
			if len(others) > 3 {
				if err := w.s.RemoveNode(ctx, "test", others[i].name()); err != nil {
					t.Fatal(err)
				}
				others = slices.Delete(others, i, i+1)
			}
		default:
			others[i].lite(func(r *wire.MapRequest) {
				r.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(rnd.IntN(250))}), uint16(1+rnd.IntN(60000)))}
			})
		}
	}

	n := x.open(resumable("", 0))
	saved := make(map[int64][]byte) // by the number of the message
	handle := ""
	resumed := 0
	next := func() error {
		err := n.read()
		if n.last != nil && n.last.MapSessionHandle != "" && n.last.MapSessionHandle != handle {
			handle = n.last.MapSessionHandle
			clear(saved)
		}
		if err == nil && n.last.Seq > 0 {
			saved[n.last.Seq] = n.save()
		}
		return err
	}
	settle := func() {
		for n.last = nil; n.last == nil || n.last.Seq == 0; {
			if err := next(); err != nil {
				t.Fatal(err)
			}
		}
	}
	settle()
	for round := range 60 {
		for range rnd.IntN(5) {
			change()
		}
		// Everything until here has come when this has.
		name := fmt.Sprintf("x%d", round)
		if err := w.s.RenameNode(ctx, "test", n.self.StableID, name); err != nil {
			t.Fatal(err)
		}
		for n.self.Name != name+".mesh.internal." || n.last.Seq == 0 {
			if err := next(); err != nil {
				t.Fatal(err)
			}
		}
		n.cancel()
		for range rnd.IntN(5) {
			change()
		}
		// The last messages may not have arrived.
		seqs := slices.Sorted(maps.Keys(saved))
		seq := seqs[max(0, len(seqs)-1-rnd.IntN(4))]
		before := handle
		n = x.open(resumable(handle, seq))
		n.restore(t, saved[seq])
		for s := range saved {
			if s > seq {
				delete(saved, s) // was never seen
			}
		}
		settle()
		if handle == before {
			resumed++
		}
		full := x.fetch()
		if got, want := n.save(), full.save(); string(got) != string(want) {
			t.Fatalf("round %d, resumed at %d: the node knows\n%s\nwant\n%s", round, seq, got, want)
		}
	}
	if resumed < 50 {
		t.Errorf("only %d of 60 streams were resumed", resumed)
	}
}

// name returns what administrators call the machine's node.
func (m *machine) name() string {
	m.w.s.mu.Lock()
	defer m.w.s.mu.Unlock()
	return string(m.w.s.nodes.byKey[m.key.Public()].StableID)
}

// Whoever cannot show that it has the map gets all of it.
func TestResumeRefused(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	x, y := w.machine().join(key), w.machine().join(key)
	ny := y.poll(resumable("", 0))
	for name, change := range map[string]func(r *wire.MapRequest, handle string, seq int64){
		"good":            func(r *wire.MapRequest, h string, s int64) {},
		"no handle":       func(r *wire.MapRequest, h string, s int64) { r.MapSessionHandle = "" },
		"another handle":  func(r *wire.MapRequest, h string, s int64) { r.MapSessionHandle = "x" + h[1:] },
		"handle of y":     func(r *wire.MapRequest, h string, s int64) { r.MapSessionHandle = ny.last.MapSessionHandle },
		"from the future": func(r *wire.MapRequest, h string, s int64) { r.MapSessionSeq = s + 1000 },
		"from nowhere":    func(r *wire.MapRequest, h string, s int64) { r.MapSessionSeq = 0 },
		"negative":        func(r *wire.MapRequest, h string, s int64) { r.MapSessionSeq = -1 },
		"another process": func(r *wire.MapRequest, h string, s int64) { r.MeshInstance = "another" },
	} {
		x := w.machine().join(key)
		n := x.poll(resumable("", 0))
		handle, seq := n.last.MapSessionHandle, n.last.Seq
		if handle == "" || seq != 1 {
			t.Fatalf("%s: handle %q, seq %d", name, handle, seq)
		}
		n.cancel()
		n = x.poll(func(r *wire.MapRequest) {
			resumable(handle, seq)(r)
			change(r, handle, seq)
		})
		if got, want := n.last.MapSessionHandle == handle, name == "good"; got != want {
			t.Errorf("%s: resumed: %v", name, got)
		}
		if full := len(n.last.Peers) > 0; full == (name == "good") {
			t.Errorf("%s: complete map: %v", name, full)
		}
	}
	// Stock nodes are sent nothing of it.
	n := x.poll(nil)
	if n.last.MapSessionHandle != "" || n.last.Seq != 0 {
		t.Errorf("a node that does not resume is sent handle %q, seq %d", n.last.MapSessionHandle, n.last.Seq)
	}
}

// What a node that does not come back knew is forgotten.
func TestResumeEnds(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	x := w.machine().join(w.key(store.Key{}))
	n := x.poll(resumable("", 0))
	n.cancel()
	parked := func() (*node, bool) {
		w.s.mu.Lock()
		defer w.s.mu.Unlock()
		me := w.s.nodes.byKey[x.key.Public()]
		return me, me.parked != nil
	}
	me, ok := parked()
	for ; !ok && t.Context().Err() == nil; me, ok = parked() {
		<-time.After(time.Millisecond)
	}
	w.s.mu.Lock()
	me.online, me.offlineAt = presenceOffline, time.Time{} // for long
	me.idleSince = time.Now().Add(-resumeFor)
	w.s.scheduleNode(me)
	w.s.mu.Unlock()
	w.s.lookAtDue()
	if _, ok := parked(); ok {
		t.Error("it can still be resumed")
	}
}

// What can be taken back is bounded; beyond that the map is complete.
func TestResumeLogIsBounded(t *testing.T) {
	se := session{handle: "h"}
	for range 10 * maxTaken {
		se.tell(undo{peers: make([]undoPeer, 3)})
	}
	if len(se.taken) != maxTaken || se.peers != 3*maxTaken || se.oldest != se.seq-maxTaken {
		t.Errorf("%d messages and %d peers can be taken back, from %d to %d", len(se.taken), se.peers, se.seq, se.oldest)
	}
	se.tell(undo{peers: make([]undoPeer, maxTakenPeers+1)})
	if len(se.taken) != 0 || se.peers != 0 || se.oldest != se.seq {
		t.Errorf("after a large message %d messages and %d peers can be taken back", len(se.taken), se.peers)
	}
	st, old := newStream(1, nil), newStream(1, nil)
	old.session = session{handle: "h", seq: 9, oldest: 5}
	if st.resume(old, true, "h", 4) || !st.resume(old, true, "h", 5) {
		t.Error("the bound is not kept")
	}
}
