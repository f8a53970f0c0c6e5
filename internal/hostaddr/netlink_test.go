package hostaddr

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// nlMessage makes a netlink message, its length included.
func nlMessage(kind uint16, body ...byte) []byte {
	b := make([]byte, nlHeaderLen, nlHeaderLen+len(body))
	binary.NativeEndian.PutUint32(b, uint32(nlHeaderLen+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	b = append(b, body...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

// nlRoute makes the body of a route message.
func nlRoute(dstLen, table byte, attrs ...[]byte) []byte {
	b := make([]byte, routeHeaderLen)
	b[0], b[1], b[4] = 2, dstLen, table
	for _, a := range attrs {
		b = append(b, a...)
	}
	return b
}

func nlAttr(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

func TestNetlink(t *testing.T) {
	gateway := nlAttr(rtaGateway, 192, 0, 2, 1)
	route := nlRoute(0, mainTable, gateway, nlAttr(rtaOif, 2, 0, 0, 0))
	var p netlinkParser
	for i, c := range []struct {
		in   []byte
		want Change
	}{
		{nil, Change{}},
		{nlMessage(nlError, 0, 0, 0, 0), Change{}},
		{nlMessage(rtmNewLink, make([]byte, 16)...), Change{Addresses: true}},
		{nlMessage(rtmDelAddr, make([]byte, 8)...), Change{Addresses: true}},
		{nlMessage(rtmNewRoute, route...), Change{Route: true}},
		{nlMessage(rtmNewRoute, route...), Change{}}, // said before
		{nlMessage(rtmDelRoute, route...), Change{Route: true}},
		{nlMessage(rtmNewRoute, route...), Change{Route: true}},
		{nlMessage(rtmNewRoute, nlRoute(24, mainTable, gateway)...), Change{}},                                               // no default
		{nlMessage(rtmNewRoute, nlRoute(0, 255, gateway)...), Change{}},                                                      // another table
		{nlMessage(rtmNewRoute, nlRoute(0, 0, nlAttr(rtaTable, binary.NativeEndian.AppendUint32(nil, 99)...))...), Change{}}, // named apart
		{nlMessage(rtmNewRoute, nlRoute(0, mainTable, nlAttr(rtaGateway, 192, 0, 2, 9))...), Change{Route: true}},
		{append(nlMessage(rtmNewAddr, 1, 2, 3), nlMessage(rtmDelRoute, route...)...), Change{Addresses: true, Route: true}},
		{nlMessage(rtmNewRoute, route...)[:20], Change{}},
		{nlMessage(rtmNewRoute, route[:5]...), Change{}},
		{bytes.Repeat([]byte{0xff}, 64), Change{}},
		{make([]byte, 64), Change{}},
	} {
		if got := p.parse(c.in); got != c.want {
			t.Errorf("%d: %+v, want %+v", i, got, c.want)
		}
	}
	for i := range 1000 {
		p.parse(nlMessage(rtmNewRoute, nlRoute(0, mainTable, nlAttr(rtaOif, byte(i), byte(i>>8), 0, 0))...))
	}
	if len(p.routes) > maxRoutes {
		t.Errorf("%d routes remembered", len(p.routes))
	}
}

func FuzzNetlink(f *testing.F) {
	f.Add(nlMessage(rtmNewRoute, nlRoute(0, mainTable, nlAttr(rtaGateway, 1, 2, 3, 4))...))
	f.Add(nlMessage(rtmDelLink, 1, 2, 3))
	f.Add([]byte{1, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p netlinkParser
		p.parse(b)
		p.parse(b)
	})
}
