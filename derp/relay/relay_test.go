package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"mesh/derp"
	"mesh/identity"
)

func TestExchange(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x, y := b.dial(), b.dial()
	if x.ServerKey() != b.srv.Key() {
		t.Error("relay key")
	}
	x.send(y.pub, "one", "two", disco("three"), "")
	// Path discovery may overtake.
	got := map[any]bool{}
	for range 4 {
		got[y.next()] = true
	}
	for _, s := range []string{"one", "two", disco("three"), ""} {
		if !got[packet{x.pub, s}] {
			t.Errorf("missing %q in %v", s, got)
		}
	}
	y.send(x.pub, "back")
	x.wantPacket(y.pub, "back")
	x.send(x.pub, "to myself")
	x.wantPacket(x.pub, "to myself")
	big := string(bytes.Repeat([]byte{7}, derp.MaxPacket))
	x.send(y.pub, big)
	y.wantPacket(x.pub, big)
	x.NotePreferred(true)
	x.sync()
	if st := b.srv.Stats(); st.Clients != 2 || st.Keys != 2 || st.PacketsIn != 7 || st.PacketsOut != 7 || st.Accepted != 2 || st.Pending != 0 {
		t.Errorf("%+v", st)
	}
	if keys := b.srv.Connected(); len(keys) != 2 {
		t.Errorf("connected %v", keys)
	}
}

func TestOrderAndContent(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, DataPackets: 1 << 20, DataBytes: 64 << 20})
	key := identity.NewNode()
	cfg := b.config(key)
	cfg.QueuePackets, cfg.QueueBytes = 1<<20, 64<<20
	c, err := derp.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	x, y := newNode(t, c, key), b.dial()
	const n = 5000
	for i := range n {
		p := binary.BigEndian.AppendUint32(nil, uint32(i))
		p = append(p, bytes.Repeat([]byte{byte(i)}, i%3000)...)
		if err := x.Send(y.pub, p); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		p, ok := y.next().(packet)
		if !ok || p.from != x.pub || binary.BigEndian.Uint32([]byte(p.text)) != uint32(i) {
			t.Fatalf("packet %d is %.20q", i, p.text)
		}
		if want := bytes.Repeat([]byte{byte(i)}, i%3000); p.text[4:] != string(want) {
			t.Fatalf("packet %d changed", i)
		}
	}
}

func TestAdmission(t *testing.T) {
	member := identity.NewNode()
	var sources []netip.Addr
	var mu sync.Mutex
	b := newBed(t, Config{Admit: func(_ context.Context, key identity.NodePublic, source netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		sources = append(sources, source)
		if key != member.Public() {
			return errors.New("no such node")
		}
		return nil
	}})
	x := b.dialAs(member)
	stranger := identity.NewNode()
	_, err := derp.Dial(t.Context(), b.config(stranger))
	if !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("stranger: %v", err)
	}
	// It is not reachable either.
	x.send(stranger.Public(), disco("hello"))
	x.wantGone(stranger.Public(), derp.PeerNotHere)
	if len(sources) != 2 || sources[0] != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("sources %v", sources)
	}
	if st := b.srv.Stats(); st.Refused != 1 || st.Clients != 1 {
		t.Errorf("%+v", st)
	}
}

func TestNilAdmitRefusesEveryone(t *testing.T) {
	b := newBed(t, Config{})
	if _, err := derp.Dial(t.Context(), b.config(identity.NewNode())); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestSlowAdmitRefuses(t *testing.T) {
	b := newBed(t, Config{AdmitTimeout: 10 * time.Millisecond, Admit: func(ctx context.Context, _ identity.NodePublic, _ netip.Addr) error {
		<-ctx.Done()
		return nil // too late to count
	}})
	if _, err := derp.Dial(t.Context(), b.config(identity.NewNode())); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestForgedKey(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	victim := identity.NewNode().Public()
	raw := b.raw()
	key := raw.serverKey()
	payload := derp.SealClientInfo(identity.NewNode(), key, derp.ClientInfo{})
	k := victim.Bytes()
	copy(payload, k[:])
	raw.write(derp.FrameClientInfo, payload)
	raw.wantClosed()
	if len(b.srv.Connected()) != 0 {
		t.Error("logged in with a forged key")
	}
}

func TestRevoke(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	bad, good, other := b.dial(), b.dial(), b.dial()
	second := b.dialAs(bad.key) // both connections of the key are cut
	second.wantHealth(healthDuplicate)
	bad.wantHealth(healthDuplicate)
	second.send(good.pub, "hi")
	good.wantPacket(bad.pub, "hi")

	b.srv.Revoke(bad.pub, identity.NewNode().Public())
	if n := len(b.srv.Connected()); n != 2 {
		t.Errorf("%d keys connected after Revoke", n)
	}
	bad.wantEnd()
	second.wantEnd()
	good.wantGone(bad.pub, derp.PeerDisconnected)
	good.send(other.pub, "still here")
	other.wantPacket(good.pub, "still here")
	good.send(bad.pub, disco("x"))
	good.wantGone(bad.pub, derp.PeerNotHere)
}

func TestRevokeDuringAdmission(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	b := newBed(t, Config{Admit: func(context.Context, identity.NodePublic, netip.Addr) error {
		close(asked)
		<-answer
		return nil // decided before the revocation
	}})
	key := identity.NewNode()
	result := make(chan error, 1)
	go func() {
		_, err := derp.Dial(t.Context(), b.config(key))
		result <- err
	}()
	<-asked
	b.srv.Revoke(key.Public())
	close(answer)
	if err := <-result; !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
	if len(b.srv.Connected()) != 0 {
		t.Error("slipped through")
	}
}

func TestRecheck(t *testing.T) {
	var mu sync.Mutex
	banned := map[identity.NodePublic]bool{}
	b := newBed(t, Config{Admit: func(_ context.Context, key identity.NodePublic, _ netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		if banned[key] {
			return errors.New("banned")
		}
		return nil
	}})
	var nodes []*node
	for range 20 {
		nodes = append(nodes, b.dial())
	}
	if n := b.srv.Recheck(t.Context()); n != 0 {
		t.Errorf("cut %d", n)
	}
	mu.Lock()
	for _, n := range nodes[:7] {
		banned[n.pub] = true
	}
	mu.Unlock()
	if n := b.srv.Recheck(t.Context()); n != 7 {
		t.Errorf("cut %d, want 7", n)
	}
	for _, n := range nodes[:7] {
		n.wantEnd()
	}
	for _, n := range nodes[7:] {
		n.quiet()
	}
}

func TestRecheckDuringAdmission(t *testing.T) {
	asked := make(chan struct{}, 10)
	answers := make(chan error)
	b := newBed(t, Config{Admit: func(context.Context, identity.NodePublic, netip.Addr) error {
		asked <- struct{}{}
		return <-answers
	}})
	result := make(chan error, 1)
	go func() {
		_, err := derp.Dial(t.Context(), b.config(identity.NewNode()))
		result <- err
	}()
	<-asked
	b.srv.Recheck(t.Context()) // the rules have changed while Admit thinks
	answers <- nil
	<-asked // so it is asked again
	answers <- errors.New("no longer")
	if err := <-result; !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestPeerGone(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x, heard, spoke, other := b.dial(), b.dial(), b.dial(), b.dial()
	x.send(heard.pub, "hi")
	heard.wantPacket(x.pub, "hi")
	spoke.send(x.pub, "hello")
	x.wantPacket(spoke.pub, "hello")
	x.Close()
	heard.wantGone(x.pub, derp.PeerDisconnected)
	spoke.quiet() // sent to it but never heard from it
	other.quiet()
	// Once it is gone: data to it vanishes, path discovery is answered.
	heard.send(x.pub, "data", "data")
	heard.quiet()
	heard.send(x.pub, disco("ping"))
	heard.wantGone(x.pub, derp.PeerNotHere)
}

func TestPeerNotHereIsRateLimited(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	start := time.Now()
	for i := range 50 {
		x.send(identity.NewNode().Public(), disco(fmt.Sprint(i)))
		x.sync()
	}
	limit := unknownBurst + int(time.Since(start)/time.Second)*unknownRate + 1
	if n := len(x.in); n < unknownBurst || n > limit {
		t.Errorf("%d answers, want %d to %d", n, unknownBurst, limit)
	}
}

func TestDuplicateKey(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, MaxPerKey: 3})
	x := b.dial()
	y1 := b.dial()
	x.send(y1.pub, "1")
	y1.wantPacket(x.pub, "1")
	y1.send(x.pub, "hello")
	x.wantPacket(y1.pub, "hello")

	y2 := b.dialAs(y1.key)
	y1.wantHealth(healthDuplicate)
	y2.wantHealth(healthDuplicate)
	x.send(y1.pub, "to the newest")
	y2.wantPacket(x.pub, "to the newest")
	y1.sync() // y1 sent last now
	x.send(y1.pub, "to the last sender")
	y1.wantPacket(x.pub, "to the last sender")
	y2.quiet() // no split delivery; and now y2 sent last

	y2.Close()
	y1.wantHealth("")
	x.send(y1.pub, "to the one left")
	y1.wantPacket(x.pub, "to the one left")
	x.quiet() // no word that y is gone

	y3, y4 := b.dialAs(y1.key), b.dialAs(y1.key)
	y5 := b.dialAs(y1.key)        // one too many: the oldest leaves
	for ended := false; !ended; { // after the word about y3 and y4, unless it was cut before
		_, ended = y1.next().(error)
	}
	for _, n := range []*node{y3, y4, y5} {
		n.Close()
	}
	x.wantGone(y1.pub, derp.PeerDisconnected)
}

func TestDuplicateSwitchesUnderLoad(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	key := identity.NewNode()
	for range 20 {
		y := b.dialAs(key)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				z := b.dialAs(key)
				for range 50 {
					z.Send(x.pub, []byte("z"))
				}
				z.Close()
			})
		}
		wg.Go(func() { b.srv.Recheck(t.Context()) })
		wg.Wait()
		y.Close()
	}
	until(t, "only x is left", func() bool { return len(b.srv.Connected()) == 1 })
}

func TestClose(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { b.srv.Close() })
	}
	wg.Wait()
	x.wantEnd()
	if err := b.srv.Accept(t.Context(), closedPipe(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Accept = %v", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.srv.Serve(ln, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve = %v", err)
	}
}

func closedPipe() net.Conn {
	a, b := net.Pipe()
	b.Close()
	return a
}
