package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

// tagged joins a node with one tag under the given host name.
func (w *world) tagged(tag, name string) *machine {
	w.t.Helper()
	m := w.machine()
	req := m.registerRequest(w.key(store.Key{Tags: []string{tag}}))
	req.Hostinfo.Hostname = name
	if resp, err := m.register(req); err != nil || resp.Error != "" {
		w.t.Fatal(resp, err)
	}
	return m
}

func (w *world) setPolicy(text string) {
	w.t.Helper()
	if _, err := w.s.SetPolicy(context.Background(), "test", text, -1); err != nil {
		w.t.Fatal(err)
	}
}

const owners = `"tagOwners":{"tag:a":[],"tag:b":[],"tag:c":[]}`

func TestPolicyDeltas(t *testing.T) {
	w := newWorld(t, nil)
	if st := w.s.PolicyState(); !st.DenyAll || st.Version != 0 {
		t.Errorf("state without a policy: %+v", st)
	}
	a, b, c := w.tagged("tag:a", "a"), w.tagged("tag:b", "b"), w.tagged("tag:c", "c")
	na, nb, nc := a.poll(nil), b.poll(nil), c.poll(nil)
	for _, n := range []*netmap{na, nb, nc} {
		if len(n.peers) != 0 || n.filter == nil || len(n.filter) != 0 {
			t.Fatalf("without a policy: peers %v, filter %v", n.peers, n.filter)
		}
	}
	w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:5432"]}]}`)
	na.until(t, "b", func() bool { return na.peers[nb.self.ID] != nil })
	nb.until(t, "a", func() bool { return na.peers[nb.self.ID] != nil && len(nb.filter) == 1 && len(nb.peers) == 1 })
	if len(na.filter) != 0 || na.policy != 1 || nb.policy != 1 {
		t.Errorf("a's filter %v, policies %d %d", na.filter, na.policy, nb.policy)
	}
	r := nb.filter[0]
	if len(r.DstPorts) == 0 || r.DstPorts[0].Ports.First != 5432 || len(r.MeshOrigins) == 0 {
		t.Errorf("b's rule: %+v", r)
	}
	// Another port: b hears a filter and no peer; a hears nothing of it.
	w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:80"]}]}`)
	nb.until(t, "the other port", func() bool { return nb.filter[0].DstPorts[0].Ports.First == 80 })
	if len(nb.last.PeersChanged)+len(nb.last.PeersRemoved)+len(nb.last.PeersChangedPatch) > 0 {
		t.Errorf("a change of ports moved peers: %+v", nb.last)
	}
	w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:c"],"dst":["tag:a:*"]}]}`)
	na.until(t, "c instead of b", func() bool { return na.peers[nb.self.ID] == nil && na.peers[nc.self.ID] != nil && len(na.filter) == 1 })
	nb.until(t, "nobody", func() bool { return len(nb.peers) == 0 && len(nb.filter) == 0 })
	if na.policy != 3 {
		t.Errorf("a says policy %d, want 3", na.policy)
	}
	if na.seen[na.self.ID] || nb.seen[nc.self.ID] || nc.seen[nb.self.ID] {
		t.Error("a stream named a node that its reader must not see")
	}
	if _, err := w.s.SetPolicy(context.Background(), "test", `{"acl":[]}`, -1); !errors.Is(err, ErrPolicy) {
		t.Errorf("unknown member: %v", err)
	}
	if st := w.s.PolicyState(); st.Version != 3 || st.DenyAll {
		t.Errorf("state after a refused policy: %+v", st)
	}
}

// TestRandomChanges changes nodes and policies at random while all nodes poll.
// In the end each node's map must equal a fresh one, and no message may ever
// have named a node that no policy so far let the reader see.
func TestRandomChanges(t *testing.T) {
	w := newWorld(t, nil)
	rng := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	tags := []string{"tag:a", "tag:b", "tag:c"}
	// tag:c is never named with tag:a: these two may never see each other.
	policies := []string{
		`{` + owners + `,"acls":[]}`,
		`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:1-100"]}]}`,
		`{` + owners + `,"acls":[{"action":"accept","src":["tag:c"],"dst":["tag:b:*"]}]}`,
		`{` + owners + `,"acls":[{"action":"accept","src":["tag:a","tag:b"],"dst":["tag:a:*"]},{"action":"accept","src":["tag:c"],"dst":["tag:c:22"]}]}`,
	}
	type peer struct {
		*machine
		tag string
		n   *netmap
	}
	var peers []*peer
	add := func() {
		p := &peer{tag: tags[rng.IntN(3)]}
		p.machine = w.tagged(p.tag, "x")
		p.n = p.poll(nil)
		peers = append(peers, p)
	}
	for range 8 {
		add()
	}
	byID := map[wire.NodeID]string{}
	steps := 150
	if long() {
		steps = 10_000
	}
	for range steps {
		p := peers[rng.IntN(len(peers))]
		switch rng.IntN(10) {
		case 0, 1:
			w.setPolicy(policies[rng.IntN(len(policies))])
		case 2:
			add()
		case 3:
			if len(peers) > 3 {
				i := rng.IntN(len(peers))
				byID[peers[i].n.self.ID] = peers[i].tag
				if err := w.s.RemoveNode(context.Background(), "test", string(peers[i].n.self.StableID)); err != nil {
					t.Fatal(err)
				}
				peers[i].n.cancel()
				peers = append(peers[:i], peers[i+1:]...)
			}
		default:
			home := 1 + rng.IntN(1000)
			p.lite(func(r *wire.MapRequest) {
				r.Hostinfo.Hostname = fmt.Sprintf("x%d", rng.IntN(3))
				r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: home}
			})
		}
	}
	// A last change that everybody hears of marks the end.
	for _, p := range peers {
		byID[p.n.self.ID] = p.tag
	}
	w.s.SetDERPMap(&wire.DERPMap{Regions: map[int]*wire.DERPRegion{}})
	for _, p := range peers {
		p.n.until(t, "the last change", func() bool { return len(p.n.derp.Regions) == 0 })
		// The rest of the same news comes right behind.
		want := p.fetch()
		p.n.until(t, "the final map", func() bool { return same(p.n, want) })
		for id := range p.n.seen {
			if other := byID[id]; p.tag != "tag:b" && other != "tag:b" && other != p.tag {
				t.Errorf("node of %s heard of node %d of %s", p.tag, id, other)
			}
		}
	}
}

// fetch returns a fresh map.
func (m *machine) fetch() *netmap {
	return m.pollWith(func(r *wire.MapRequest) { r.Stream = false })
}

func (m *machine) pollWith(change func(*wire.MapRequest)) *netmap {
	n := m.poll(change)
	n.cancel()
	return n
}

func same(a, b *netmap) bool {
	if len(a.peers) != len(b.peers) || fmt.Sprint(a.filter) != fmt.Sprint(b.filter) || a.self.Name != b.self.Name {
		return false
	}
	for id, p := range a.peers {
		q := b.peers[id]
		if q == nil || p.Name != q.Name || p.HomeDERP != q.HomeDERP || p.Key != q.Key || p.DiscoKey != q.DiscoKey || online(p) != online(q) {
			return false
		}
	}
	return true
}
