package portmap

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// gatewayPort is where gateways listen for NAT-PMP and PCP.
const gatewayPort = 5351

// NAT-PMP, RFC 6886. All numbers are big endian.
const (
	pmpVersion   = 0
	pmpOpAddress = 0
	pmpOpMapUDP  = 1
	pmpResponse  = 128 // added to the operation

	pmpOK             = 0
	pmpNetworkFailure = 3
)

// pmpAnswer is a response of either operation.
type pmpAnswer struct {
	op     byte // without pmpResponse
	result uint16
	epoch  uint32

	address netip.Addr // of pmpOpAddress

	internal, external uint16 // of pmpOpMapUDP
	lifetime           time.Duration
}

// pmpAddressRequest asks for the external address.
func pmpAddressRequest() []byte { return []byte{pmpVersion, pmpOpAddress} }

// pmpMapRequest asks for a mapping; a lifetime of 0 asks for its end.
func pmpMapRequest(internal, external uint16, lifetime time.Duration) []byte {
	b := []byte{pmpVersion, pmpOpMapUDP, 0, 0}
	b = binary.BigEndian.AppendUint16(b, internal)
	b = binary.BigEndian.AppendUint16(b, external)
	return binary.BigEndian.AppendUint32(b, uint32(lifetime/time.Second))
}

// parsePMP reads a response. A refusal may come without the rest of the body.
func parsePMP(b []byte) (a pmpAnswer, ok bool) {
	if len(b) < 8 || b[0] != pmpVersion || b[1] < pmpResponse {
		return a, false
	}
	a.op = b[1] - pmpResponse
	a.result = binary.BigEndian.Uint16(b[2:])
	a.epoch = binary.BigEndian.Uint32(b[4:])
	if a.result != pmpOK {
		return a, true
	}
	switch {
	case a.op == pmpOpAddress && len(b) >= 12:
		a.address = netip.AddrFrom4([4]byte(b[8:12]))
	case a.op == pmpOpMapUDP && len(b) >= 16:
		a.internal = binary.BigEndian.Uint16(b[8:])
		a.external = binary.BigEndian.Uint16(b[10:])
		a.lifetime = time.Duration(binary.BigEndian.Uint32(b[12:])) * time.Second
	default:
		return a, false
	}
	return a, true
}

func (a pmpAnswer) err() error {
	if a.result == pmpOK {
		return nil
	}
	text := map[uint16]string{
		1: "version not supported", 2: "not authorized", pmpNetworkFailure: "the gateway has no address itself",
		4: "out of resources", 5: "operation not supported",
	}[a.result]
	if text == "" {
		text = "for an unknown reason"
	}
	return &refusal{PMP, int(a.result), text}
}

// askPMP sends a request and returns its answer.
func (c *Client) askPMP(ctx context.Context, l link, request []byte, fits func(pmpAnswer) bool) (a pmpAnswer, err error) {
	if !l.gw.Is4() {
		return a, errNothing
	}
	err = c.ask(ctx, l, request, func(b []byte) bool {
		got, ok := parsePMP(b)
		if ok = ok && got.op == request[1] && (got.result != pmpOK || fits(got)); ok {
			a = got
		}
		return ok
	})
	if err == nil {
		err = a.err()
	}
	return a, err
}

func (c *Client) mapPMP(ctx context.Context, l link, port, suggest uint16) (*lease, error) {
	addr, err := c.askPMP(ctx, l, pmpAddressRequest(), func(pmpAnswer) bool { return true })
	if err != nil {
		return nil, err
	}
	a, err := c.askPMP(ctx, l, pmpMapRequest(port, suggest, wantLifetime), func(a pmpAnswer) bool { return a.internal == port })
	if err != nil {
		return nil, err
	}
	external := netip.AddrPortFrom(addr.address, a.external)
	if !sensible(external) || a.lifetime == 0 {
		return nil, fmt.Errorf("the gateway offers %v for %v, which is of no use", external, a.lifetime)
	}
	return &lease{external: external, lifetime: a.lifetime, epoch: a.epoch}, nil
}

func (c *Client) releasePMP(ctx context.Context, l link, le *lease) error {
	_, err := c.askPMP(ctx, l, pmpMapRequest(le.internal, 0, 0), func(a pmpAnswer) bool { return a.internal == le.internal })
	return err
}
