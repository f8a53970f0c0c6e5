package filter

import (
	"net/netip"
	"testing"

	"mesh/identity"
)

// Attempts are noted only when asked, once for each flow, and within bounds.
func TestAttempts(t *testing.T) {
	f, _ := clocked(t, Config{}, allow("100.64.0.2", "100.64.0.1", 5432, 5432))
	w := attempted{f, alice, netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("100.64.0.1"), 4000}
	w.try(t, 5432, true)
	if got := w.f.Attempts(); got != nil {
		t.Fatalf("noted unasked: %v", got)
	}
	w.f.NoteAttempts(true)
	w.try(t, 5432, true) // of a flow that is known already
	if got := w.f.Attempts(); got != nil {
		t.Fatalf("noted of a known flow: %v", got)
	}
	w.from++
	w.try(t, 5432, true)
	w.try(t, 22, false)
	w.try(t, 22, false)
	got := map[uint16]Attempt{}
	for _, a := range w.f.Attempts() {
		got[a.Port] = a
	}
	want := Attempt{Src: w.src, Dst: w.dst, Proto: ProtoTCP, Port: 5432, Allowed: 1}
	if len(got) != 2 || got[5432] != want {
		t.Errorf("attempts %v, want %v", got, want)
	}
	if a := got[22]; a.Allowed != 0 || a.Denied != 2 {
		t.Errorf("denied: %v", a)
	}
	for port := range uint16(3 * maxAttempts) {
		w.try(t, 10000+port, false)
	}
	if n := len(w.f.Attempts()); n != maxAttempts {
		t.Errorf("%d are noted, want %d at most", n, maxAttempts)
	}
	w.f.NoteAttempts(false)
	w.try(t, 23, false)
	if got := w.f.Attempts(); got != nil {
		t.Errorf("noted after the end: %v", got)
	}
}

type attempted struct {
	f        *Filter
	peer     identity.NodePublic
	src, dst netip.Addr
	from     uint16
}

// try sends a connection attempt to a port.
func (w *attempted) try(t *testing.T, port uint16, allowed bool) {
	t.Helper()
	p := Packet{Proto: ProtoTCP, Src: netip.AddrPortFrom(w.src, w.from), Dst: netip.AddrPortFrom(w.dst, port), Flags: TCPSyn}
	if v := w.f.In(&p, w.peer); (v.Action == Accept) != allowed {
		t.Fatalf("port %d: %v", port, v)
	}
}
