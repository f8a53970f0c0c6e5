package portmap

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// PCP, RFC 6887. All numbers are big endian, all addresses in IPv6 form.
const (
	pcpVersion    = 2
	pcpOpAnnounce = 0
	pcpOpMap      = 1
	pcpResponse   = 0x80 // or-ed to the operation
	pcpProtoUDP   = 17
	pcpHeaderLen  = 24
	pcpMapLen     = 36
	pcpMaxLen     = 1100

	pcpOK = 0
)

// pcpAnswer is a response.
type pcpAnswer struct {
	op       byte // without pcpResponse
	result   byte
	lifetime time.Duration
	epoch    uint32

	// Of pcpOpMap:
	nonce    [12]byte
	internal uint16
	external netip.AddrPort
}

// pcpRequest begins a request.
func pcpRequest(op byte, self netip.Addr, lifetime time.Duration) []byte {
	b := make([]byte, 0, pcpHeaderLen+pcpMapLen)
	b = append(b, pcpVersion, op, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(lifetime/time.Second))
	a := self.As16()
	return append(b, a[:]...)
}

// pcpMapRequest asks for a mapping; a lifetime of 0 asks for its end.
func pcpMapRequest(self netip.Addr, nonce [12]byte, internal uint16, suggest netip.AddrPort, lifetime time.Duration) []byte {
	b := pcpRequest(pcpOpMap, self, lifetime)
	b = append(b, nonce[:]...)
	b = append(b, pcpProtoUDP, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, internal)
	b = binary.BigEndian.AppendUint16(b, suggest.Port())
	// No address to suggest is the unspecified one of the right family.
	any4 := netip.IPv4Unspecified().As16()
	switch {
	case suggest.Addr().IsValid() && suggest.Addr().Is4() == self.Is4():
		a := suggest.Addr().As16()
		return append(b, a[:]...)
	case self.Is4():
		return append(b, any4[:]...)
	}
	return append(b, make([]byte, 16)...)
}

// parsePCP reads a response, without its options: we ask for none.
func parsePCP(b []byte) (a pcpAnswer, ok bool) {
	if len(b) < pcpHeaderLen || len(b) > pcpMaxLen || len(b)%4 != 0 || b[0] != pcpVersion || b[1]&pcpResponse == 0 {
		return a, false
	}
	a.op = b[1] &^ pcpResponse
	a.result = b[3]
	a.lifetime = time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Second
	a.epoch = binary.BigEndian.Uint32(b[8:])
	if a.op != pcpOpMap {
		return a, true
	}
	b = b[pcpHeaderLen:]
	if len(b) < pcpMapLen || b[12] != pcpProtoUDP {
		return a, false
	}
	a.nonce = [12]byte(b[:12])
	a.internal = binary.BigEndian.Uint16(b[16:])
	a.external = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[20:36])).Unmap(), binary.BigEndian.Uint16(b[18:]))
	return a, true
}

func (a pcpAnswer) err() error {
	if a.result == pcpOK {
		return nil
	}
	text := map[byte]string{
		1: "version not supported", 2: "not authorized", 3: "malformed request", 4: "operation not supported",
		5: "option not supported", 6: "malformed option", 7: "network failure", 8: "no resources",
		9: "protocol not supported", 10: "quota exceeded", 11: "external address not to be had",
		12: "address mismatch", 13: "too many remote peers",
	}[a.result]
	if text == "" {
		text = "for an unknown reason"
	}
	return &refusal{PCP, int(a.result), text}
}

// askPCPMap sends a request for a mapping or its end, and returns the answer.
// Nobody off the path knows the nonce.
func (c *Client) askPCPMap(ctx context.Context, l link, port uint16, suggest netip.AddrPort, lifetime time.Duration) (a pcpAnswer, err error) {
	nonce := c.recall(l).nonce
	err = c.ask(ctx, l, pcpMapRequest(l.self, nonce, port, suggest, lifetime), func(b []byte) bool {
		got, ok := parsePCP(b)
		if ok = ok && got.op == pcpOpMap && got.nonce == nonce && got.internal == port; ok {
			a = got
		}
		return ok
	})
	if err == nil {
		err = a.err()
	}
	return a, err
}

func (c *Client) mapPCP(ctx context.Context, l link, port uint16, suggest netip.AddrPort) (*lease, error) {
	a, err := c.askPCPMap(ctx, l, port, suggest, wantLifetime)
	if err != nil {
		return nil, err
	}
	if !sensible(a.external) || a.external.Addr().Is4() != l.self.Is4() || a.lifetime == 0 {
		return nil, fmt.Errorf("the gateway offers %v for %v, which is of no use", a.external, a.lifetime)
	}
	return &lease{external: a.external, lifetime: a.lifetime, epoch: a.epoch}, nil
}

func (c *Client) releasePCP(ctx context.Context, l link, le *lease) error {
	_, err := c.askPCPMap(ctx, l, le.internal, netip.AddrPort{}, 0)
	return err
}

// restarted reports whether a gateway lost its mappings between two answers:
// its epoch then does not advance with our clock. It is the rule of RFC 6887
// section 8.5, which lets the clocks differ by a sixteenth and two seconds.
func restarted(before uint32, beforeAt time.Time, after uint32, afterAt time.Time) bool {
	if int64(after) < int64(before)-1 {
		return true
	}
	ours := int64(afterAt.Sub(beforeAt) / time.Second)
	theirs := int64(after) - int64(before)
	return ours+2 < theirs-theirs/16 || theirs+2 < ours-ours/16
}
