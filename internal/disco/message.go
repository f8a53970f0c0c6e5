package disco

import (
	"net/netip"

	"mesh/identity"
)

// Ping asks the receiver for a Pong over the path the Ping took.
type Ping struct {
	TxID TxID
	// Node is the sender's node key. It tells nodes that share a disco key
	// apart and proves nothing. Zero when the sender did not say.
	Node identity.NodePublic
	// Padding is the number of zero bytes at the end, used to probe path MTU.
	Padding int
}

// Type implements Message.
func (Ping) Type() Type { return TypePing }

func (m Ping) appendPayload(b []byte) []byte {
	b = append(b, m.TxID[:]...)
	key := m.Node.Bytes()
	b = append(b, key[:]...)
	return append(b, make([]byte, max(m.Padding, 0))...)
}

func parsePing(b []byte) (Message, error) {
	if len(b) < txLen {
		return nil, ErrShort
	}
	m := Ping{TxID: TxID(b)}
	if rest := b[txLen:]; len(rest) >= identity.KeyLen {
		// An all-zero key is padding of a sender that names no node: it
		// reads as the zero key either way.
		m.Node = identity.NodePublicFrom([identity.KeyLen]byte(rest[:identity.KeyLen]))
		m.Padding = len(rest) - identity.KeyLen
	} else {
		m.Padding = len(rest)
	}
	return m, nil
}

// Pong answers a Ping.
type Pong struct {
	TxID TxID
	// Src is where the Ping came from, as seen by who answers. For a Ping that
	// came by relay it is RelayAddr of the region.
	Src netip.AddrPort
}

// Type implements Message.
func (Pong) Type() Type { return TypePong }

func (m Pong) appendPayload(b []byte) []byte {
	b = append(b, m.TxID[:]...)
	if !m.Src.Addr().IsValid() {
		return append(b, make([]byte, addrLen)...)
	}
	return appendAddr(b, m.Src)
}

func parsePong(b []byte) (Message, error) {
	if len(b) < txLen+addrLen {
		return nil, ErrShort
	}
	return Pong{TxID: TxID(b), Src: readAddr(b[txLen:])}, nil
}

// RelayAddr is the address that stands for a relay region inside a Pong. It is
// never dialled.
func RelayAddr(region int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 3, 3, 40}), uint16(region))
}

// CallMeMaybe asks the receiver to ping the sender's endpoints at once, so that
// both sides open their NATs at the same moment. It is sent by relay only.
type CallMeMaybe struct {
	Endpoints []netip.AddrPort
}

// Type implements Message.
func (CallMeMaybe) Type() Type { return TypeCallMeMaybe }

func (m CallMeMaybe) appendPayload(b []byte) []byte {
	for _, e := range m.Endpoints {
		if e.Addr().IsValid() {
			b = appendAddr(b, e)
		}
	}
	return b
}

func parseCallMeMaybe(b []byte) (Message, error) {
	if len(b)%addrLen != 0 {
		return CallMeMaybe{}, nil // the protocol reads a body of odd length as empty
	}
	n := min(len(b)/addrLen, MaxEndpoints)
	m := CallMeMaybe{Endpoints: make([]netip.AddrPort, n)}
	for i := range m.Endpoints {
		m.Endpoints[i] = readAddr(b[i*addrLen:])
	}
	return m, nil
}

// Parse reads a decrypted message: type, version, payload. Bytes behind what it
// knows are ignored.
func Parse(b []byte) (Message, error) {
	if len(b) < headLen {
		return nil, ErrShort
	}
	t, body := Type(b[0]), b[headLen:]
	if b[1] != version0 {
		return nil, ErrUnknownType
	}
	switch t {
	case TypePing:
		return parsePing(body)
	case TypePong:
		return parsePong(body)
	case TypeCallMeMaybe:
		return parseCallMeMaybe(body)
	case TypeMeet:
		return parseMeet(body)
	case TypeSize:
		return parseSize(body)
	}
	return nil, ErrUnknownType
}

// Append appends type, version and payload of m to b: what Parse reads.
func Append(b []byte, m Message) []byte {
	return m.appendPayload(append(b, byte(m.Type()), version0))
}
