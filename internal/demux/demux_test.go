package demux

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var here = netip.MustParseAddrPort("192.0.2.1:41641")

// fake is a node that notes what it gets.
type fake struct {
	seat *Seat
	key  byte // initiations for it have this in their last byte

	mu     sync.Mutex // guards what follows
	runs   [][][]byte
	opened int
	tried  int // boxes
	asked  int // MACs
	lost   int
	held   int
	knows  map[identity.DiscoPublic]bool
	block  chan struct{} // Take waits for it; nil = it does not
	inside chan struct{}
}

func (f *fake) Take(_ netip.AddrPort, datagrams [][]byte) {
	if f.block != nil {
		f.inside <- struct{}{}
		<-f.block
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs = append(f.runs, slices.Clone(datagrams))
}

func (f *fake) Owns(b []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return b[len(b)-1] == f.key
}

func (f *fake) Disco(_ netip.AddrPort, sender identity.DiscoPublic, b []byte) Verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.knows[sender] {
		return Unknown
	}
	f.tried++
	if b[len(b)-1] != f.key {
		return Refused
	}
	f.opened++
	return Opened
}

func (f *fake) Hold(netip.AddrPort, identity.DiscoPublic, []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held++
}

func (f *fake) Lost(netip.AddrPort, []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost++
}

func (f *fake) take() (runs [][][]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	runs, f.runs = f.runs, nil
	return runs
}

func sit(t testing.TB, table *Table, key byte) *fake {
	t.Helper()
	f := &fake{key: key, knows: make(map[identity.DiscoPublic]bool)}
	if f.seat = table.Join(); f.seat == nil {
		t.Fatal("no seat")
	}
	f.seat.Begin(f)
	return f
}

// message is a WireGuard message of a type and length with the index where it
// belongs.
func message(kind byte, length int, index uint32) []byte {
	b := make([]byte, length)
	b[0] = kind
	at := 4
	if kind == response {
		at = 8
	}
	if kind != initiation {
		binary.LittleEndian.PutUint32(b[at:], index)
	}
	return b
}

func initiationFor(key byte) []byte {
	b := message(initiation, initiationLen, 0)
	b[len(b)-1] = key
	return b
}

func discoFor(sender identity.DiscoPublic, key byte) []byte {
	pub := sender.Bytes()
	b := append([]byte(disco.Magic), pub[:]...)
	return append(append(b, make([]byte, 40)...), key)
}

func TestFindsTheNode(t *testing.T) {
	table := New()
	a, b := sit(t, table, 1), sit(t, table, 2)
	tx := stun.NewTxID()
	b.seat.Mark(&tx)
	for _, c := range []struct {
		name string
		in   []byte
		want *fake // nil = nobody
	}{
		{"data", message(data, 100, b.seat.Index()), b},
		{"data of the other", message(data, 100, a.seat.Index()), a},
		{"keepalive", message(data, 32, b.seat.Index()), b},
		{"response", message(response, 92, b.seat.Index()), b},
		{"cookie", message(cookie, 64, b.seat.Index()), b},
		{"initiation", initiationFor(2), b},
		{"initiation again", initiationFor(2), b},
		{"initiation for the other", initiationFor(1), a},
		{"STUN", stun.AppendResponse(nil, tx, here), b},
		{"initiation for nobody", initiationFor(9), nil},
		{"short response", message(response, 91, b.seat.Index()), nil},
		{"long cookie", message(cookie, 65, b.seat.Index()), nil},
		{"short data", message(data, 31, b.seat.Index()), nil},
		{"no such type", message(5, 100, b.seat.Index()), nil},
		{"reserved bytes", append([]byte{4, 1}, message(data, 100, b.seat.Index())[2:]...), nil},
		{"seat of nobody", message(data, 100, 200<<24), nil},
		{"empty", nil, nil},
	} {
		table.Take(here, [][]byte{c.in})
		for _, f := range []*fake{a, b} {
			runs := f.take()
			if got := len(runs) == 1 && len(runs[0]) == 1; got != (f == c.want) {
				t.Errorf("%s: node %d got %d runs", c.name, f.key, len(runs))
			}
		}
	}
	if s := table.Stats(); s.Strays != 8 || s.Refused != 0 {
		t.Errorf("%+v", s)
	}
}

// A train is handed over as it lies, cut only where another node's begins.
func TestSplitsTrains(t *testing.T) {
	table := New()
	a, b := sit(t, table, 1), sit(t, table, 2)
	ia, ib := a.seat.Index(), b.seat.Index()
	train := [][]byte{
		message(data, 100, ia), message(data, 101, ia), message(data, 102, ib),
		message(data, 103, 200<<24), message(data, 104, ib), message(data, 105, ib), message(data, 106, ia),
	}
	table.Take(here, train)
	lengths := func(f *fake) (out [][]int) {
		for _, run := range f.take() {
			var l []int
			for _, d := range run {
				l = append(l, len(d))
			}
			out = append(out, l)
		}
		return out
	}
	equal := func(got, want [][]int) bool { return slices.EqualFunc(got, want, slices.Equal[[]int]) }
	if got := lengths(a); !equal(got, [][]int{{100, 101}, {106}}) {
		t.Errorf("first node: %v", got)
	}
	if got := lengths(b); !equal(got, [][]int{{102}, {104, 105}}) {
		t.Errorf("second node: %v", got)
	}
	whole := train[:2]
	if n := testing.AllocsPerRun(100, func() {
		table.Take(here, whole)
		a.runs = a.runs[:0]
	}); n > 1 { // that of the fake
		t.Errorf("%v allocations for a train", n)
	}
}

func TestDiscoBySender(t *testing.T) {
	table := New()
	var nodes []*fake
	sender := identity.NewDisco().Public()
	for i := range 20 {
		f := sit(t, table, byte(i))
		f.knows[sender] = true
		nodes = append(nodes, f)
	}
	tried := func() (n int) {
		for _, f := range nodes {
			n += f.tried
			f.tried = 0
		}
		return n
	}
	// Of nodes that know the sender but do not talk with it, some are tried.
	table.Take(here, [][]byte{discoFor(sender, 77)})
	if n := tried(); n != searchBoxes {
		t.Errorf("%d boxes tried for a stranger", n)
	}
	for _, f := range nodes {
		f.seat.Talk(sender)
	}
	for i, f := range nodes { // in the order in which peers send to many
		for range 2 {
			table.Take(here, [][]byte{discoFor(sender, f.key)})
		}
		if n := tried(); f.opened != 2 || i > 0 && n > 3 {
			t.Errorf("node %d: %d opened, %d boxes tried", i, f.opened, n)
		}
	}
	table.Take(here, [][]byte{discoFor(sender, 77)})
	if n := tried(); n != len(nodes) {
		t.Errorf("%d boxes tried for a packet that nobody opens", n)
	}
	// An unknown sender costs no box.
	table.Take(here, [][]byte{discoFor(identity.NewDisco().Public(), 1)})
	if n := tried(); n != 0 {
		t.Errorf("%d boxes tried for somebody unknown", n)
	}
	for _, f := range nodes {
		f.seat.Talk(sender)
		f.seat.Hang(sender)
	}
	if n := len(table.talks[sender].seats); n != len(nodes) {
		t.Errorf("%d of %d talk", n, len(nodes))
	}
	for _, f := range nodes[:10] {
		f.seat.Hang(sender)
		f.seat.Hang(sender) // once too often does no harm
	}
	for _, f := range nodes[10:] {
		f.seat.Leave()
	}
	if len(table.talks) != 0 {
		t.Error("somebody still talks")
	}
}

// What somebody unknown sends is held, if there are few who could wait for it.
func TestHeldAmongFew(t *testing.T) {
	table := New()
	for i := range holdAmong {
		sit(t, table, byte(i))
	}
	last := sit(t, table, 100)
	stranger, known := identity.NewDisco().Public(), identity.NewDisco().Public()
	last.knows[known] = true
	table.Take(here, [][]byte{discoFor(stranger, 100)})
	if last.held != 0 {
		t.Error("held among many")
	}
	for i := range 3 {
		table.seats[i].Leave()
	}
	table.Take(here, [][]byte{discoFor(stranger, 100), discoFor(known, 100), discoFor(known, 1)})
	if last.held != 1 || last.opened != 1 {
		t.Errorf("%d held, %d opened", last.held, last.opened)
	}
}

// A flood costs what the bounds say, and does not keep those out who were there
// before.
func TestFloodIsBounded(t *testing.T) {
	table := New()
	sender := identity.NewDisco().Public()
	var nodes []*fake
	for i := range 100 {
		f := sit(t, table, byte(i))
		f.knows[sender] = true
		f.seat.Talk(sender)
		nodes = append(nodes, f)
	}
	table.Take(here, [][]byte{initiationFor(50)}) // now known
	for i := range 2000 {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), uint16(i+1))
		table.Take(from, [][]byte{initiationFor(200), discoFor(sender, 200)})
	}
	asked, tried := 0, 0
	for _, f := range nodes {
		asked, tried = asked+f.asked, tried+f.tried
	}
	// The burst, and what comes back while the flood is on; a slow machine takes
	// two seconds at most.
	if asked > 3*macRate || tried > 3*boxRate {
		t.Errorf("%d MACs and %d boxes", asked, tried)
	}
	if s := table.Stats(); s.Refused < 1000 {
		t.Errorf("%+v", s)
	}
	nodes[50].take()
	table.Take(here, [][]byte{initiationFor(50)})
	if len(nodes[50].take()) != 1 {
		t.Error("a known caller is kept out")
	}
}

// What is remembered of callers is bounded.
func TestForgetsCallers(t *testing.T) {
	table := New()
	sit(t, table, 1)
	for i := range 2 * maxCallers {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 7)
		table.Take(from, [][]byte{initiationFor(1)})
	}
	if n := len(table.callers); n != maxCallers {
		t.Errorf("%d callers", n)
	}
}

func TestLeaving(t *testing.T) {
	table := New()
	a := sit(t, table, 1)
	a.block, a.inside = make(chan struct{}), make(chan struct{})
	index := a.seat.Index()
	taken := make(chan struct{})
	go func() {
		defer close(taken)
		table.Take(here, [][]byte{message(data, 100, index)})
	}()
	<-a.inside
	a.seat.Stop()
	left := make(chan struct{})
	go func() {
		defer close(left)
		a.seat.Leave()
	}()
	table.Take(here, [][]byte{message(data, 100, index)}) // not held up
	select {
	case <-left:
		t.Error("left during a call")
	default:
	}
	close(a.block)
	<-taken
	<-left
	if n := len(a.take()); n != 1 {
		t.Errorf("%d runs", n)
	}
	a.seat.Leave() // again

	// The next has another seat, and hears of sessions that were of the former.
	b := sit(t, table, 2)
	if b.seat == a.seat {
		t.Error("same seat at once")
	}
	table.Take(here, [][]byte{message(data, 100, index), message(data, keepaliveLen, index)})
	if b.lost != 1 || len(b.take()) != 0 {
		t.Errorf("heard of %d lost", b.lost)
	}
	for range 10 * lostRate {
		table.Take(here, [][]byte{message(data, 100, index)})
	}
	if b.lost > 3*lostRate {
		t.Errorf("heard of %d lost", b.lost)
	}
	seats := []*Seat{b.seat}
	for s := table.Join(); s != nil; s = table.Join() {
		seats = append(seats, s)
	}
	if len(seats) != Seats {
		t.Errorf("%d seats", len(seats))
	}
	seats[7].Leave()
	if s := table.Join(); s != seats[7] {
		t.Error("a seat that was left is not given again")
	}
}

func TestAtOnce(t *testing.T) {
	table := New()
	sender := identity.NewDisco().Public()
	stay := sit(t, table, 100)
	stay.knows[sender] = true
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 300 {
				f := sit(t, table, byte(i))
				f.seat.Talk(sender)
				table.Take(here, [][]byte{message(data, 100, f.seat.Index()), initiationFor(byte(i)), discoFor(sender, 100)})
				f.seat.Hang(sender)
				f.seat.Leave()
			}
		})
	}
	wg.Wait()
	if table.nodes != 1 || len(table.talks) != 0 {
		t.Errorf("%d nodes, %d talks", table.nodes, len(table.talks))
	}
}

func FuzzTake(f *testing.F) {
	sender := identity.NewDisco().Public()
	table := New()
	a := sit(f, table, 0)
	a.knows[sender] = true
	a.seat.Talk(sender)
	f.Add(message(data, 100, 1), initiationFor(0))
	f.Add(stun.AppendRequest(nil, stun.NewTxID()), discoFor(sender, 0))
	f.Add(message(response, 92, 1), []byte(disco.Magic))
	f.Fuzz(func(t *testing.T, x, y []byte) {
		table.Take(here, [][]byte{x, y, x})
		a.take()
	})
}

// What a bogus initiation costs is BenchmarkOwns of package tunnel times the
// number of nodes; this is what finding costs.
func BenchmarkTake(b *testing.B) {
	table := New()
	n := &idle{}
	for range Seats - 1 {
		table.Join().Begin(n)
	}
	s := table.Join()
	s.Begin(n)
	train := make([][]byte, 40)
	for i := range train {
		train[i] = message(data, 1300, s.Index())
	}
	b.ReportAllocs()
	for b.Loop() {
		table.Take(here, train)
	}
}

type idle struct{}

func (*idle) Take(netip.AddrPort, [][]byte)                                  {}
func (*idle) Owns([]byte) bool                                               { return false }
func (*idle) Disco(netip.AddrPort, identity.DiscoPublic, []byte) (v Verdict) { return v }
func (*idle) Hold(netip.AddrPort, identity.DiscoPublic, []byte)              {}
func (*idle) Lost(netip.AddrPort, []byte)                                    {}
