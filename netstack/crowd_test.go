package netstack

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Which packets wait for others: small data of many connections at once, within
// bounds; and all of it leaves, before what comes later.
func TestCrowd(t *testing.T) {
	data := func(port uint16, n int) []byte {
		return say(true, port, header.TCPFlagAck|header.TCPFlagPsh, 100, 500, n)
	}
	var sent [][]byte
	c := &crowd{out: func(packets [][]byte) {
		for _, p := range packets {
			sent = append(sent, bytes.Clone(p))
		}
	}}
	join := func(p []byte) (joined, start bool) {
		c.at = time.Now() // this machine may do something else between two
		return c.join(p)
	}
	join(data(1, 10))
	for range 100 {
		if joined, _ := join(data(1, 10)); joined {
			t.Fatal("a connection that is alone waits")
		}
	}
	for port := range uint16(crowdFrom - 1) {
		if joined, _ := join(data(2+port, 10)); joined {
			t.Fatal("a few connections wait")
		}
	}
	joined, started := 0, 0
	for port := range uint16(2 * crowdMost) {
		is, start := join(data(100+port, 10))
		if is {
			joined++
		}
		if start {
			started++
		}
	}
	if joined != crowdMost || started != 1 {
		t.Errorf("%d wait, %d have to see to them", joined, started)
	}
	for name, p := range map[string][]byte{
		"FIN":             say(true, 7, header.TCPFlagAck|header.TCPFlagFin, 100, 500, 10),
		"RST":             say(true, 7, header.TCPFlagAck|header.TCPFlagRst, 100, 500, 0),
		"acknowledgement": say(true, 7, header.TCPFlagAck, 100, 500, 0),
		"nothing":         {},
		"not TCP":         append([]byte{0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17}, make([]byte, 50)...),
	} {
		if _, ok := smallData(p); ok {
			t.Errorf("%s is small data", name)
		}
	}
	last := say(true, 9, header.TCPFlagAck|header.TCPFlagFin, 100, 500, 0)
	c.send([][]byte{last})
	if len(sent) != crowdMost+1 || !bytes.Equal(sent[crowdMost], last) {
		t.Errorf("%d packets left", len(sent))
	}
	c.leave()
	if len(sent) != crowdMost+1 || c.going || c.pending.Load() {
		t.Errorf("at the end %d packets have left, going %v", len(sent), c.going)
	}
	if _, start := join(data(1, 10)); !start {
		t.Error("nobody sees to the next")
	}
	c.leave()
	if len(sent) != crowdMost+2 {
		t.Errorf("later %d packets have left", len(sent))
	}
}

// What a connection sends does not overtake its small packets that wait, or that
// are on their way out; that of others does.
func TestCrowdKeepsOrder(t *testing.T) {
	data := func(port uint16, n int) []byte {
		return say(true, port, header.TCPFlagAck|header.TCPFlagPsh, 100, 500, n)
	}
	var mu sync.Mutex
	var sent []int // lengths, when they have left
	begun, goOn := make(chan struct{}, 100), make(chan struct{})
	c := &crowd{out: func(packets [][]byte) {
		if len(packets[0]) < 100 {
			begun <- struct{}{}
			<-goOn
		}
		mu.Lock()
		defer mu.Unlock()
		for _, p := range packets {
			sent = append(sent, len(p))
		}
	}}
	join := func(p []byte) (start bool) {
		for joined := false; !joined; { // unless this machine does something else meanwhile
			c.mu.Lock()
			c.at, c.score = time.Now(), 2*crowdFrom
			c.mu.Unlock()
			joined, start = c.join(p)
		}
		return start
	}
	if !join(data(1, 1)) {
		t.Fatal("nobody sees to what waits")
	}
	join(data(2, 2))
	left := make(chan struct{})
	go func() {
		defer close(left)
		c.leave()
	}()
	<-begun // the small packets are being sent
	join(data(3, 3))
	c.send([][]byte{data(2, 1000), data(2, 1001)}) // follows what is being sent,
	c.send([][]byte{data(3, 1002)})                // and this what waits
	c.send([][]byte{data(4, 1003)})                // this need not wait
	mu.Lock()
	if len(sent) != 1 || sent[0] != len(data(4, 1003)) {
		t.Errorf("packets of lengths %v have left before those that they follow", sent)
	}
	mu.Unlock()
	close(goOn)
	<-left
	at := func(n int) int { return slices.Index(sent, len(data(1, n))) }
	if at(2) < 0 || at(3) < 0 || at(1000) < at(2) || at(1001) < at(1000) || at(1002) < at(3) {
		t.Errorf("packets of lengths %v left in this order", sent)
	}
	if c.pending.Load() || c.going {
		t.Error("something waits")
	}
}

// Many connections that call at once share what their packets cost, and each
// gets its own answers.
func TestCrowdOfCalls(t *testing.T) {
	const conns, calls = 64, 20
	a, b, w := newPair(t, Config{})
	var mu sync.Mutex
	packets, batches := 0, 0
	w.setFilter(func(_ bool, list [][]byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		packets += len(list)
		batches++
		return list
	})
	l := listen(t, b, "tcp", netip.AddrPort{})
	var wg sync.WaitGroup
	defer wg.Wait()
	var all []*Conn
	for range conns {
		ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
		if err != nil {
			t.Fatal(err)
		}
		defer ca.Close()
		all = append(all, ca)
		cb, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			io.Copy(cb, cb)
			cb.Close()
		})
	}
	said, heard := make([]byte, 64), make([]byte, 64)
	for n := range calls {
		for i, ca := range all {
			binary.BigEndian.PutUint32(said, uint32(i*calls+n))
			if _, err := ca.Write(said); err != nil {
				t.Fatal(err)
			}
		}
		for i, ca := range all {
			binary.BigEndian.PutUint32(said, uint32(i*calls+n))
			if _, err := io.ReadFull(ca, heard); err != nil || !bytes.Equal(said, heard) {
				t.Fatalf("connection %d, call %d: %x: %v", i, n, heard, err)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if packets == batches {
		t.Errorf("%d packets left one by one", packets)
	}
}
