package filter

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"mesh/control/wire"
)

func benchRules(b *testing.B, rules, sources int) *Rules {
	w := rand.New(rand.NewPCG(1, 3))
	var in []wire.FilterRule
	for i := range rules {
		r := allow("", "100.64.0.1", uint16(i+1), uint16(i+1), 6)
		for range sources / 10 {
			n := w.IntN(sources)
			r.SrcIPs = append(r.SrcIPs, netip.AddrFrom4([4]byte{100, 65, byte(n >> 8), byte(n)}).String())
		}
		in = append(in, r)
	}
	return compile(b, in...)
}

func BenchmarkEstablished(b *testing.B) {
	f := newFilter(b, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(b), alice)
	f.Out(out(TCPSyn|TCPAck).packet(b), alice)
	data := in(TCPAck)
	data.body = make([]byte, 1200)
	bytes := data.build()
	var p Packet
	b.ReportAllocs()
	for b.Loop() {
		p.Decode(bytes)
		if f.In(&p, alice).Action != Accept {
			b.Fatal("dropped")
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	data := in(TCPAck)
	data.body = make([]byte, 1200)
	bytes := data.build()
	var p Packet
	b.ReportAllocs()
	for b.Loop() {
		p.Decode(bytes)
	}
}

// A SYN that 500 rules with 1,000 sources each deny, and one that they allow.
func BenchmarkMatch(b *testing.B) {
	r := benchRules(b, 500, 10000)
	for _, bench := range []struct {
		name string
		port uint16
	}{{"denied", 9999}, {"allowed", 250}} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				r.match(query{proto: ProtoTCP, remote: netip.AddrFrom4([4]byte{100, 65, byte(i >> 8 % 39), byte(i)}), local: netip.MustParseAddr("100.64.0.1"), port: bench.port})
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	for b.Loop() {
		benchRules(b, 500, 1000)
	}
}

func BenchmarkNewFlow(b *testing.B) {
	f := newFilter(b, allow("*", "*", 22, 22))
	bytes := in(TCPSyn).build()
	var p Packet
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		binary.BigEndian.PutUint16(bytes[20:], uint16(i))
		bytes[15] = byte(i >> 16)
		p.Decode(bytes)
		f.In(&p, alice)
	}
}
