package natlab

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh/internal/actor"
)

// place is where a node of the grid stands. Besides the kinds of routers there
// are "public" and "cgnat", which is a home router behind another.
type place string

const (
	public place = "public"
	cgnat  place = "cgnat"
)

// places are in the order of the table of outcomes.
var places = []place{
	public, place(FullCone), place(AddrRestricted), place(PortRestricted), place(Home), place(Bare),
	place(Symmetric), place(FullyRandom), cgnat, place(UDPBlocked),
}

// outcomes says which way two nodes must find: D direct, R relay, o either,
// depending on who begins. A row and a column for each place.
var outcomes = map[place]string{
	//                     pub full addr port home bare sym symf cgn udp
	public:                "D   D    D    D    D    D    D   D    D   R",
	place(FullCone):       "D   D    D    D    D    D    D   D    D   R",
	place(AddrRestricted): "D   D    D    D    D    D    D   D    D   R",
	place(PortRestricted): "D   D    D    D    D    o    R   R    D   R",
	place(Home):           "D   D    D    D    D    o    R   R    D   R",
	place(Bare):           "D   D    D    o    o    o    R   R    o   R",
	place(Symmetric):      "D   D    D    R    R    R    R   R    R   R",
	place(FullyRandom):    "D   D    D    R    R    R    R   R    R   R",
	cgnat:                 "D   D    D    D    D    o    R   R    D   R",
	place(UDPBlocked):     "R   R    R    R    R    R    R   R    R   R",
}

func outcome(a, b place) string { return strings.Fields(outcomes[a])[slices.Index(places, b)] }

// at adds a host at a place.
func (l *Lab) at(p place, name string) *Host {
	l.t.Helper()
	switch p {
	case public:
		return l.Public(name)
	case cgnat:
		return l.Router(name+"-cgn", Home).Router(name+"-r", Home).Host(name)
	default:
		return l.Router(name+"-r", Kind(p)).Host(name)
	}
}

// The grid: two nodes in every pair of places, where A begins, B begins, or
// both at once. All pairs of one start happen at the same time.
func TestGrid(t *testing.T) {
	w := newWorld(t)
	starts := []string{"A first", "B first", "together"}
	chosen := places
	if !full() {
		starts = starts[2:]
		chosen = []place{public, place(PortRestricted), place(Home), place(Symmetric), cgnat, place(UDPBlocked)}
	}
	sideA, sideB := make(map[place]*Host), make(map[place]*Host)
	for i, p := range chosen {
		sideA[p] = w.at(p, fmt.Sprintf("a%d", i))
		sideB[p] = w.at(p, fmt.Sprintf("b%d", i))
	}
	type cell struct{ a, b place }
	results := make(map[cell][]string)
	for round, start := range starts {
		nodesA, nodesB := make(map[place]*actor.Process), make(map[place]*actor.Process)
		var all []*actor.Process
		for i, p := range chosen {
			nodesA[p] = w.node(fmt.Sprintf("a%d-%d", i, round), sideA[p])
			nodesB[p] = w.node(fmt.Sprintf("b%d-%d", i, round), sideB[p])
			all = append(all, nodesA[p], nodesB[p])
		}
		w.await(all...)
		var mu sync.Mutex // guards results
		var wg sync.WaitGroup
		for i, pa := range chosen {
			for _, pb := range chosen[i:] {
				a, b := nodesA[pa], nodesB[pb]
				wg.Go(func() {
					r := meet(t, start, outcome(pa, pb), a, b)
					mu.Lock()
					defer mu.Unlock()
					results[cell{pa, pb}] = append(results[cell{pa, pb}], r)
				})
			}
		}
		wg.Wait()
		for _, p := range all {
			p.Stop()
		}
	}
	var lines []string
	for c, r := range results {
		lines = append(lines, fmt.Sprintf("%-16s %-16s want %s: %s", c.a, c.b, outcome(c.a, c.b), strings.Join(r, "; ")))
	}
	slices.SortFunc(lines, cmp.Compare)
	t.Logf("first answer, first direct answer, longest gap\n%s", strings.Join(lines, "\n"))
}

// meet lets two nodes find each other and checks which way they found.
func meet(t *testing.T, start, want string, a, b *actor.Process) string {
	beat := actor.Beat{For: 4 * time.Second, Every: 50 * time.Millisecond}
	if want == "D" {
		beat.For, beat.Until = actor.Patience/2, "direct"
	}
	var r [2]actor.Beaten
	var wg sync.WaitGroup
	call := func(i int, from, to *actor.Process) {
		b := beat
		b.Addr = to.Name() + ":7"
		from.Must("beat", b, &r[i])
	}
	if start != "B first" {
		wg.Go(func() { call(0, a, b) })
	}
	if start != "A first" {
		wg.Go(func() { call(1, b, a) })
	}
	wg.Wait()
	got := r[0]
	if start == "B first" {
		got = r[1]
	}
	for _, r := range r {
		if r.Error != "" {
			t.Errorf("%s and %s, %s: %s", a.Name(), b.Name(), start, r.Error)
		}
	}
	switch {
	case want == "D" && got.Path != "direct", want == "R" && got.Path != "relay":
		t.Errorf("%s and %s, %s: the path is %q", a.Name(), b.Name(), start, got.Path)
	}
	return fmt.Sprintf("%s %s %v %v %v", start, got.Path, round(got.First), round(got.Direct), round(got.Gap))
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
