package disco

import "encoding/binary"

// TypeSize is a message of ours, see EXTENSIONS.md; stock peers ignore it.
const TypeSize Type = 0xE6

// Size asks whether a datagram of a size arrives, or says that one did. Only
// nodes that take packets larger than the mesh's MTU answer.
type Size struct {
	TxID   TxID
	Answer bool
	// Bytes is the length of the asking packet; Seal pads one that asks to it,
	// and an answer repeats it.
	Bytes int
}

// SizeLen is the length of a whole packet without padding.
const SizeLen = Overhead + sizeLen

const sizeLen = 1 + txLen + 2

// Type implements Message.
func (Size) Type() Type { return TypeSize }

func (m Size) appendPayload(b []byte) []byte {
	phase := byte(1)
	if m.Answer {
		phase = 2
	}
	b = append(append(b, phase), m.TxID[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(m.Bytes))
	if m.Answer {
		return b
	}
	return append(b, make([]byte, max(m.Bytes-SizeLen, 0))...)
}

func parseSize(b []byte) (Message, error) {
	if len(b) < sizeLen {
		return nil, ErrShort
	}
	m := Size{TxID: TxID(b[1:]), Bytes: int(binary.BigEndian.Uint16(b[1+txLen:]))}
	switch b[0] {
	case 1:
		// What counts is what came, not what it claims to be.
		m.Bytes = min(m.Bytes, Overhead+len(b))
	case 2:
		m.Answer = true
	default:
		return nil, ErrUnknownType
	}
	return m, nil
}
