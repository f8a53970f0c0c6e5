package derp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"mesh/identity"
)

// writesConn notes the sizes of writes.
type writesConn struct {
	net.Conn
	mu    sync.Mutex // guards sizes
	sizes []int
}

func (c *writesConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.sizes = append(c.sizes, len(b))
	c.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *writesConn) take() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.sizes
	c.sizes = nil
	return s
}

func selfMade(t testing.TB) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// The records of a batch leave together, in order, and nothing stays behind.
func TestGatherUnderTLS(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	under := &writesConn{Conn: a}
	server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{selfMade(t)}})
	client := tls.Client(NewGather(under), &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	c := NewConn(client, nil, ConnConfig{})
	if c.out == nil {
		t.Fatal("the gather is not found")
	}
	under.take()

	const n = 300
	packet := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 1+i*37%1400) }
	key := identity.NewNode().Public()
	total := 0
	for i := range n {
		c.EnqueuePackets(Data, FrameSendPacket, key, packet(i))
		total += len(packet(i)) + FrameHeaderLen + identity.KeyLen
	}
	c.EnqueuePackets(Data, FrameSendPacket, key, make([]byte, MaxPacket)) // more than the space holds, with the rest
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := c.WriteLoop(); err != nil {
			t.Error(err)
		}
	})
	in := newReader(server, nil)
	for i := range n + 1 {
		f, err := in.frame()
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, MaxPacket)
		if i < n {
			want = packet(i)
		}
		if _, got, _ := SplitKey(f.Payload); !bytes.Equal(got, want) {
			t.Fatalf("packet %d has changed", i)
		}
	}
	sizes := under.take()
	if most := total/maxBatch + 6; len(sizes) > most {
		t.Errorf("%d writes %v, want %d at most", len(sizes), sizes, most)
	}
	if big := slices.Max(sizes); big <= chunkLen+100 {
		t.Errorf("largest write %d", big)
	}
	// What comes alone goes at once.
	c.EnqueuePackets(Data, FrameSendPacket, key, []byte("alone"))
	if f, err := in.frame(); err != nil || string(f.Payload[identity.KeyLen:]) != "alone" {
		t.Fatal(f, err)
	}
	c.Close()
	writer.Wait()
}
