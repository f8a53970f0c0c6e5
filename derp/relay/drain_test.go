package relay

import (
	"context"
	"testing"
	"time"

	"mesh/derp"
)

func (n *node) wantRestarting(back, tryFor time.Duration) {
	n.t.Helper()
	m, ok := n.next().(derp.Message)
	if !ok || m.Kind != derp.KindRestarting || m.ReconnectIn != back || m.TryFor != tryFor {
		n.t.Fatalf("got %+v, want that the relay restarts", m)
	}
}

// Clients are told, served until they have moved, and waited for.
func TestDrain(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x, y, visitor := b.dial(), b.dial(), b.dial()
	x.NotePreferred(true)
	y.NotePreferred(true)
	x.sync()
	y.sync()
	visitor.sync()
	if st := b.srv.Stats(); st.Homes != 2 || st.Draining {
		t.Errorf("%+v", st)
	}
	left := make(chan int, 1)
	go func() { left <- b.srv.Drain(t.Context(), 3*time.Second, time.Minute) }()
	for _, n := range []*node{x, y, visitor} {
		n.wantRestarting(3*time.Second, time.Minute)
	}
	late := b.dial() // to reach x, before it knows where x has gone
	late.wantRestarting(3*time.Second, time.Minute)
	late.send(x.pub, "still there?")
	x.wantPacket(late.pub, "still there?")

	x.NotePreferred(false)
	x.sync()
	select {
	case n := <-left:
		t.Errorf("drained with y at home here: %d", n)
	default:
	}
	if st := b.srv.Stats(); st.Homes != 1 || !st.Draining {
		t.Errorf("%+v", st)
	}
	y.Close() // is as good
	if n := <-left; n != 0 {
		t.Errorf("Drain = %d", n)
	}
	x.send(visitor.pub, "until Close") // nobody is cut before
	visitor.wantPacket(x.pub, "until Close")
}

// Clients that do not listen, or have nowhere to go, are not waited for beyond
// the bound; Close ends a Drain.
func TestDrainIsBounded(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	if n := b.srv.Drain(t.Context(), 0, 0); n != 0 {
		t.Errorf("Drain of an empty relay = %d", n)
	}
	x := b.dial()
	x.wantRestarting(0, 0)
	x.NotePreferred(true)
	x.sync()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan int, 2)
	go func() { left <- b.srv.Drain(ctx, -time.Second, 1<<60) }()
	x.wantRestarting(0, (1<<32-1)*time.Millisecond)
	cancel()
	if n := <-left; n != 1 {
		t.Errorf("Drain = %d", n)
	}
	go func() { left <- b.srv.Drain(t.Context(), 0, 0) }()
	x.wantRestarting(0, 0)
	b.srv.Close()
	<-left
	x.wantEnd()
}
