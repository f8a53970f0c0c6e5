package natlab

import (
	"context"
	"syscall"
	"testing"
	"time"

	"mesh/internal/actor"
)

// recovery is one way in which a network breaks under an open connection.
type recovery struct {
	name string
	// goal is how long the connection may stand still; ten times that fails.
	goal time.Duration
	// a and b are where the two nodes stand.
	a, b place
	// relays is how many relay processes there are besides the control server's.
	relays int
	// hurt does the damage. What it returns heals it after heal.
	hurt func(w *broken) (heal func())
	heal time.Duration // how long the damage lasts; 0 = for ever
	// before and after are the paths at the beginning and at the end, "" = any.
	before, after string
}

// broken is the world in which a recovery happens.
type broken struct {
	*world
	a, b         *actor.Process
	hostA, hostB *Host
	relayProcs   []*actor.Process
	startRelay   []func() *actor.Process
}

// routerOf finds the router that was made for a host.
func (w *broken) routerOf(h *Host) *Router {
	w.t.Helper()
	if h.router == nil {
		w.t.Fatal("the host has no router")
	}
	return h.router
}

var recoveries = []recovery{
	{
		name: "UDP dies silently", goal: 3 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "relay",
		hurt: func(w *broken) func() { w.routerOf(w.hostA).CutUDP(); return nil },
	},
	{
		name: "UDP dies and comes back", goal: 3 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "direct",
		hurt: func(w *broken) func() { r := w.routerOf(w.hostA); r.CutUDP(); return r.Heal }, heal: 5 * time.Second,
	},
	{
		name: "everything is gone for 20 s", goal: 23 * time.Second, a: place(Home), b: public, before: "direct", after: "direct",
		hurt: func(w *broken) func() { r := w.routerOf(w.hostA); r.Cut(); return r.Heal }, heal: 20 * time.Second,
	},
	{
		name: "roaming to another router", goal: 2 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "direct",
		hurt: func(w *broken) func() { w.hostA.Move(w.Router("other", Home)); return nil },
	},
	{
		name: "symmetric NAT forgets", goal: 2 * time.Second, a: place(Symmetric), b: public, before: "direct", after: "direct",
		hurt: func(w *broken) func() { w.routerOf(w.hostA).Forget(); return nil },
	},
	{
		name: "router gets another address", goal: 2 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "direct",
		hurt: func(w *broken) func() { w.routerOf(w.hostA).Renumber(); return nil },
	},
	{
		name: "interface down for 3 s", goal: 5 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "direct",
		hurt: func(w *broken) func() { w.hostA.Down(); return w.hostA.Up }, heal: 3 * time.Second,
	},
	{
		name: "process sleeps for 15 s", goal: 17 * time.Second, a: place(Home), b: place(Home), before: "direct", after: "direct",
		hurt: func(w *broken) func() {
			w.b.Signal(syscall.SIGSTOP)
			return func() { w.b.Signal(syscall.SIGCONT) }
		}, heal: 15 * time.Second,
	},
	{
		name: "large packets vanish", goal: 3 * time.Second, a: place(Home), b: place(Home), before: "direct",
		hurt: func(w *broken) func() { w.routerOf(w.hostA).Swallow(1300); return nil },
	},
	{
		name: "relay dies, another is there", goal: 2 * time.Second, a: place(UDPBlocked), b: place(Home), relays: 2, before: "relay", after: "relay",
		hurt: func(w *broken) func() {
			for _, r := range w.relayProcs[:1] {
				r.Kill()
			}
			return nil
		},
	},
	{
		name: "relay restarts after 3 s", goal: 4 * time.Second, a: place(UDPBlocked), b: place(Home), relays: 1, before: "relay", after: "relay",
		hurt: func(w *broken) func() {
			w.relayProcs[0].Kill()
			return func() { w.relayProcs[0] = w.startRelay[0]() }
		}, heal: 3 * time.Second,
	},
	{
		name: "control server dies", goal: time.Second, a: place(Home), b: place(Home), relays: 1, before: "direct", after: "direct",
		hurt: func(w *broken) func() { w.control.Kill(); return nil },
	},
}

// A connection lives through what happens to networks. How long it stood still
// is reported; that it lives, and which way it takes in the end, is asserted.
func TestRecovery(t *testing.T) {
	for i, r := range recoveries {
		if testing.Short() && i%4 != 0 {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			rounds := 1
			if full() {
				rounds = 5
			}
			for range rounds {
				recover1(t, r)
			}
		})
	}
}

func recover1(t *testing.T, r recovery) {
	w := &broken{}
	if r.relays > 0 {
		w.world = newWorld(t, func(w *world) { w.config.Relay = false })
		for i := range r.relays {
			_, start := w.relay(901 + i)
			w.startRelay = append(w.startRelay, start)
			w.relayProcs = append(w.relayProcs, start())
		}
	} else {
		w.world = newWorld(t)
	}
	w.hostA, w.hostB = w.at(r.a, "a"), w.at(r.b, "b")
	w.a, w.b = w.node("na", w.hostA), w.node("nb", w.hostB)
	w.await(w.a, w.b)

	var before actor.Beaten
	w.a.Must("beat", actor.Beat{Addr: "nb:7", For: actor.Patience / 2, Until: r.before}, &before)
	if before.Path != r.before {
		t.Fatalf("the path is %q at the beginning; %+v", before.Path, before)
	}
	// Besides, a connection whose bytes are compared.
	w.a.Must("flow", "nb:7", nil)
	last := 10*r.goal + r.heal
	during := make(chan actor.Beaten, 1)
	go func() {
		var b actor.Beaten
		// As long as it takes to be well again, but for some seconds in any case.
		w.a.Must("beat", actor.Beat{Addr: "nb:7", For: last + 5*time.Second, Still: r.heal + 4*time.Second, Until: r.after}, &b)
		during <- b
	}()
	time.Sleep(500 * time.Millisecond) // so that the connection is under way
	if heal := r.hurt(w); heal != nil {
		time.Sleep(r.heal)
		heal()
	}
	b := <-during
	ctx, cancel := context.WithTimeout(t.Context(), actor.Patience)
	defer cancel()
	if err := w.a.Call(ctx, "endflow", nil, nil); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	if b.Error != "" {
		t.Errorf("the connection broke: %s", b.Error)
	}
	if b.Gap > last {
		t.Errorf("it stood still for %v, more than ten times %v", b.Gap, r.goal)
	}
	if r.after != "" && b.Path != r.after {
		t.Errorf("the path is %q at the end", b.Path)
	}
	t.Logf("%-32s stood still for %v (goal %v), path %s, well after %v", r.name, round(b.Gap), r.goal, b.Path, round(b.Well))
	w.a.Kill()
	w.b.Kill()
}
