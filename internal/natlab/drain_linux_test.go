package natlab

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/actor"
)

// A relay that is told to end sends the nodes to another one before it goes: a
// relayed connection hardly notices, and none loses a byte.
func TestRelayDrains(t *testing.T) {
	t.Parallel()
	const drain = 10 * time.Second
	w := newWorld(t, func(w *world) { w.config.Relay = false })
	relays := make(map[int]*actor.Process)
	for region := 901; region <= 902; region++ {
		name := map[int]string{901: "relayone", 902: "relaytwo"}[region]
		h := w.Public(name)
		relays[region] = actor.Start(t, "relay", name, actor.RelayConfig{
			DataDir: filepath.Join(w.dir, name), ControlURL: w.ready.URL, ControlKey: w.ready.Key,
			RelayKey: w.newKey(admin.KeyCreate{Relay: true}),
			Listen:   net.JoinHostPort(h.IPv4.String(), "443"), STUN: net.JoinHostPort(h.IPv4.String(), "3478"),
			Region: region, Drain: drain,
		}, nil, h.Wrap()...)
	}
	a := w.node("na", w.at(place(UDPBlocked), "a"))
	b := w.node("nb", w.at(place(Home), "b"))
	w.await(a, b)
	var before actor.Beaten
	a.Must("beat", actor.Beat{Addr: "nb:7", For: actor.Patience / 2, Until: "relay"}, &before)
	if before.Path != "relay" {
		t.Fatalf("the path is %q; %+v", before.Path, before)
	}
	region := func() int {
		var st mesh.Status
		a.Must("status", nil, &st)
		for _, p := range st.Peers {
			if p.ShortName() == "nb" {
				return p.Path.Relay
			}
		}
		return 0
	}
	home := region()
	ending := relays[home]
	if ending == nil {
		t.Fatalf("by relay %d", home)
	}
	a.Must("flow", "nb:7", nil)
	during := make(chan actor.Beaten, 1)
	go func() {
		var b actor.Beaten
		a.Must("beat", actor.Beat{Addr: "nb:7", For: drain + 10*time.Second, Still: drain + 5*time.Second, Until: "relay"}, &b)
		during <- b
	}()
	time.Sleep(500 * time.Millisecond) // so that the connection is under way
	began := time.Now()
	ending.Stop()
	took := time.Since(began)
	got := <-during
	if err := a.Call(t.Context(), "endflow", nil, nil); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	if got.Error != "" {
		t.Errorf("the connection broke: %s", got.Error)
	}
	const goal = 300 * time.Millisecond
	if got.Gap > 10*goal {
		t.Errorf("it stood still for %v, more than ten times %v", got.Gap, goal)
	}
	if now := region(); now == home || relays[now] == nil {
		t.Errorf("by relay %d, was %d", now, home)
	}
	if took >= drain {
		t.Errorf("the relay took %v to end: the nodes did not move", took)
	}
	t.Logf("relay %d ended after %v; the connection stood still for %v (goal %v), well after %v", home, took.Round(time.Millisecond), round(got.Gap), goal, round(got.Well))
}
