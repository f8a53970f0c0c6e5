package path

import (
	"testing"
	"time"

	"mesh/identity"
)

func dials(n *memNet, region int) int {
	r := n.relays[region]
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dials
}

// TestAddressChangeIsNoticed: without any call, where the system tells nothing.
func TestAddressChangeIsNoticed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		for range 20 {
			a.send(t, b, "x")
			settle(100 * time.Millisecond)
		}
		before := dials(n, 1)
		a.setInterfaces("198.18.0.1/24")
		for range 25 {
			a.send(t, b, "x")
			settle(100 * time.Millisecond)
		}
		if st := a.Status(b.key()); st.Why != "network changed" || !st.Trusted {
			t.Errorf("%+v", st)
		}
		if d := dials(n, 1) - before; d != 1 {
			t.Errorf("relay connected again %d times", d)
		}
		if r := a.lastReport(); len(r.Endpoints) != 2 || r.Endpoints[1].String() != "198.18.0.1:41641" {
			t.Errorf("reported %v", r.Endpoints)
		}
		// One more address, addresses of the mesh itself, another order: no reason to doubt.
		since := a.Status(b.key()).Since
		a.setInterfaces("100.64.0.7/32", "198.18.0.2/24", "198.18.0.1/24")
		for range 25 {
			a.send(t, b, "x")
			settle(100 * time.Millisecond)
		}
		if st := a.Status(b.key()); st.Since != since || dials(n, 1)-before != 1 {
			t.Errorf("%+v, %d dials", st, dials(n, 1)-before)
		}
		if r := a.lastReport(); len(r.Endpoints) != 3 {
			t.Errorf("reported %v", r.Endpoints)
		}
		// An idle node notices too, later.
		settle(sessionTimeout + heartbeat)
		a.setInterfaces("198.18.0.9/24")
		settle(pollIdle + time.Second)
		if r := a.lastReport(); len(r.Endpoints) != 2 || r.Endpoints[1].String() != "198.18.0.9:41641" {
			t.Errorf("reported %v", r.Endpoints)
		}
	})
}

// TestFirstRoundIsLost: nobody hears what a node asks while its host comes up, and
// no peer is active; it knows its address soon all the same. Where UDP stays
// blocked it stops asking.
func TestFirstRoundIsLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newMemNet(t)
		n.relay(1)
		n.stuns[stunServer(1)] = 4 * time.Millisecond
		a := n.node("198.18.0.1")
		n.block(a.addr.Addr(), stunServer(1).Addr(), true)
		a.SetRelays(relayMap(1))
		a.Ready(t.Context())
		settle(5 * time.Second)
		works := func() bool { w := a.lastReport().NetInfo.WorkingUDP; return w != nil && *w }
		if works() {
			t.Fatal("UDP works where it is blocked")
		}
		n.block(a.addr.Addr(), stunServer(1).Addr(), false)
		settle(regatherMute << 2)
		if !works() {
			t.Errorf("what lost its first requests does not ask again: %+v", a.lastReport())
		}
		n.block(a.addr.Addr(), stunServer(1).Addr(), true)
		a.NetworkChanged()
		settle(regatherMute << (muteTries + 1))
		asked := n.count(stunServer(1))
		settle(regatherIdle / 2)
		if n := n.count(stunServer(1)); n != asked {
			t.Errorf("asks %d times where nobody ever answers", n-asked)
		}
	})
}

// TestPrivatePathIsLeft: an address of a private network that the host left is
// not sent to any more; somebody else may have it in the next network.
func TestPrivatePathIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newMemNet(t)
		n.relay(1)
		n.stuns[stunServer(1)] = 4 * time.Millisecond
		a, b := n.node("192.168.7.1"), n.node("192.168.7.2")
		a.SetRelays(relayMap(1))
		b.SetRelays(relayMap(1))
		a.knows(b.peer(1))
		b.knows(a.peer(1))
		a.Ready(t.Context())
		b.Ready(t.Context())
		a.send(t, b, "x")
		settle(time.Second)
		if st := a.Status(b.key()); st.Direct != b.addr {
			t.Fatalf("%+v", st)
		}
		a.setInterfaces("10.1.1.1/8")
		a.NetworkChanged()
		if st := a.Status(b.key()); st.Direct.IsValid() || st.Why != "network changed" {
			t.Errorf("%+v", st)
		}
	})
}

func TestClock(t *testing.T) {
	base := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s := time.Second
	for _, c := range []struct {
		name             string
		mono, wall, plan time.Duration // since the last look
		want             bool
	}{
		{"awake", s, s, s, false},
		{"no timer", 100 * s, 100 * s, 0, false},
		{"timer a bit late", 3 * s, 3 * s, s, false},
		{"stopped for 10 s", 11 * s, 11 * s, s, true},
		{"suspended, monotonic clock stood still", s, 3600 * s, s, true},
		{"suspended without a timer", s, 3600 * s, 0, true},
		{"clock set back", s, -3600 * s, s, false},
	} {
		var k clock
		if k.slept(epochAge, 0, base) {
			t.Error("slept at the first look")
		}
		plan := instant(0)
		if c.plan != 0 {
			plan = epochAge + c.plan
		}
		if got := k.slept(epochAge+c.mono, plan, base.Add(c.wall)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestSystemEvents opens and closes what the system has, and leaves nothing.
func TestSystemEvents(t *testing.T) {
	p, err := New(Config{Key: identity.NewNode(), Disco: identity.NewDisco()})
	if err != nil {
		t.Fatal(err)
	}
	p.SetRelays(nil)
	p.Close()
	p.Close()
}
