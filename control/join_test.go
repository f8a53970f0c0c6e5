package control

import (
	"bytes"
	"crypto/rand"
	"encoding"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"mesh/control/wire"
	"mesh/internal/netmap"
)

// randomKey sets a public key to random bytes: making real ones takes long.
func randomKey(t testing.TB, prefix string, k encoding.TextUnmarshaler) {
	t.Helper()
	var b [32]byte
	rand.Read(b[:])
	if err := k.UnmarshalText([]byte(prefix + hex.EncodeToString(b[:]))); err != nil {
		t.Fatal(err)
	}
}

// joinFrame is the first message of a stream in a mesh of that many peers, as
// servers send them, with its length in front.
func joinFrame(t testing.TB, peers int) []byte {
	t.Helper()
	node := func(id int) *wire.Node {
		a4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64 + byte(id>>16), byte(id >> 8), byte(id)}), 32)
		var b6 [16]byte
		copy(b6[:], []byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0})
		binary.BigEndian.PutUint32(b6[12:], uint32(id))
		a6 := netip.PrefixFrom(netip.AddrFrom16(b6), 128)
		online := id%10 != 0
		n := &wire.Node{
			ID: wire.NodeID(id), StableID: fmt.Sprintf("n%08xCNTRL", id), Name: fmt.Sprintf("agent-%d.mesh.internal.", id),
			User: wire.UserID(id%50 + 1), Addresses: []netip.Prefix{a4, a6}, AllowedIPs: []netip.Prefix{a4, a6},
			Endpoints: []netip.AddrPort{
				netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(id)}), uint16(1024+id)),
				netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(id >> 8), byte(id)}), 41641),
			},
			HomeDERP: id%5 + 1, Hostinfo: &wire.Hostinfo{OS: "linux", Hostname: fmt.Sprintf("agent-%d", id)},
			Cap: 113, Tags: []string{fmt.Sprintf("tag:team%d", id%20)}, Online: &online, MachineAuthorized: true,
		}
		randomKey(t, "nodekey:", &n.Key)
		randomKey(t, "mkey:", &n.Machine)
		randomKey(t, "discokey:", &n.DiscoKey)
		return n
	}
	m := wire.MapResponse{Node: node(1 << 20), Domain: "mesh"}
	for i := range peers {
		m.Peers = append(m.Peers, node(i+1))
	}
	for i := range 50 {
		m.UserProfiles = append(m.UserProfiles, wire.UserProfile{ID: wire.UserID(i + 1), LoginName: fmt.Sprintf("u%d@example.com", i)})
	}
	m.PacketFilters = map[string][]wire.FilterRule{"base": {{SrcIPs: []string{"*"}, DstPorts: []wire.NetPortRange{{IP: "*", Ports: wire.AllPorts}}}}}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return frame(pack(text))
}

// TestDecodeMap compares with what json.Unmarshal makes of a message.
func TestDecodeMap(t *testing.T) {
	whole := joinFrame(t, 3)
	r := newFrameReader(bytes.NewReader(whole), true, wire.MaxMapFrame, wire.MaxMapMessage)
	var three wire.MapResponse
	if err := r.next(&three); err != nil || len(three.Peers) != 3 || len(three.UserProfiles) != 50 || three.Domain != "mesh" {
		t.Fatal(err, three)
	}
	again, err := json.Marshal(three)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		string(again), `null`, `{}`, ` { } `, `{"Peers":null}`, `{"Peers":[]}`, `{"peers":[{"ID":1},null,{"ID":2,"Name":"x"}],"Domain":"d"}`,
		`{"PeersChanged":[{"ID":3}],"PeersRemoved":[1,2],"PeersChangedPatch":[{"NodeID":4}]}`, `{"\u0050eers":[{"ID":5}]}`,
		`{"PeerSeenChange":{"1":true},"Unknown":[{"Peers":[1]}],"KeepAlive":true}`, `{"Domain":"a","Domain":"b"}`,
		// These are no messages.
		``, `1`, `[]`, `"x"`, `{`, `{"Peers":`, `{"Peers":[`, `{"Peers":[{}`, `{"Peers":[{}]`, `{"Peers":{}}`, `{"Peers":1}`, `{"Peers":[1]}`,
		`{"Peers":[{"ID":"x"}]}`, `{"Domain":1}`, `{"Peers":[{}],}`, `{1:2}`, `{} {}`, `{}]`, `{"Peers":[]]}`, `nullnull`,
	} {
		var want, got wire.MapResponse
		wantErr := json.Unmarshal([]byte(text), &want)
		gotErr := decodeWhole(strings.NewReader(text), &got)
		if (wantErr == nil) != (gotErr == nil) {
			t.Errorf("%.60s: %v, but json.Unmarshal says %v", text, gotErr, wantErr)
		} else if wantErr == nil && !reflect.DeepEqual(got, want) {
			t.Errorf("%.60s: %+v, but json.Unmarshal says %+v", text, got, want)
		}
	}
}

// TestLargeFrameLeavesNothing reads a message of megabytes, which the reader must
// not hold on to, and others after it.
func TestLargeFrameLeavesNothing(t *testing.T) {
	in := joinFrame(t, 2000)
	small := frame(pack([]byte(`{"Domain":"x"}`)))
	r := newFrameReader(bytes.NewReader(slices.Concat(small, in, small, in[:len(in)-1])), true, wire.MaxMapFrame, wire.MaxMapMessage)
	defer r.close()
	for i, want := range []int{0, 2000, 0} {
		var m wire.MapResponse
		if err := r.next(&m); err != nil || len(m.Peers) != want {
			t.Fatalf("message %d: %d peers, %v", i, len(m.Peers), err)
		}
		if u := r.take(); u.buf.Cap() > 2*smallFrame || want > 0 && u.zstd != nil {
			t.Errorf("message %d: %d bytes of buffer stay, and what unpacked it", i, u.buf.Cap())
		}
	}
	var m wire.MapResponse
	if err := r.next(&m); err != io.ErrUnexpectedEOF {
		t.Errorf("a message that ends too early: %v", err)
	}
}

// liveHeap is the memory in use after a collection.
func liveHeap() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what finalizers and pools held
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// TestJoinHeap checks what a peer costs that is known and not spoken to. It is
// about 1,450 bytes; twice as much is what it was when a map kept what it came
// from.
func TestJoinHeap(t *testing.T) {
	const peers = 2000
	in := joinFrame(t, peers)
	f := newFrameReader(bytes.NewReader(in), true, wire.MaxMapFrame, wire.MaxMapMessage)
	defer f.close()
	before := liveHeap()
	m := new(wire.MapResponse)
	if err := f.next(m); err != nil {
		t.Fatal(err)
	}
	n, _, err := netmap.Apply(nil, m)
	if err != nil || n.NumPeers() != peers {
		t.Fatal(err)
	}
	m = nil
	if each := (liveHeap() - before) / peers; each > 2200 {
		t.Errorf("a peer takes %.0f bytes", each)
	}
	runtime.KeepAlive(n)
	runtime.KeepAlive(in)
}

// BenchmarkJoin10000 reads the first message of a stream, makes a map of it and
// says how much memory that keeps: with the reader, which lives on.
func BenchmarkJoin10000(b *testing.B) {
	in := joinFrame(b, 10_000)
	b.ReportAllocs()
	b.SetBytes(int64(len(in)))
	before := liveHeap()
	for b.Loop() {
		f := newFrameReader(bytes.NewReader(in), true, wire.MaxMapFrame, wire.MaxMapMessage)
		var m wire.MapResponse
		if err := f.next(&m); err != nil {
			b.Fatal(err)
		}
		n, _, err := netmap.Apply(nil, &m)
		if err != nil || n.NumPeers() != 10_000 {
			b.Fatal(err)
		}
		m = wire.MapResponse{}
		b.StopTimer()
		b.ReportMetric((liveHeap()-before)/1e6, "live-MB")
		runtime.KeepAlive(n)
		f.close()
		b.StartTimer()
	}
}
