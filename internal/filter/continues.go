package filter

import (
	"bytes"
	"encoding/binary"
)

// Continues reports whether b is a segment of the same TCP connection as a, which
// Decode took, in the same direction, and both are nothing but data and
// acknowledgements: what is judged of a is then true of b at the same moment.
// It is for runs of segments, which are most of what moves.
func Continues(a, b []byte) bool {
	const (
		v4, v6   = 20, 40 // length of IP headers without options
		reserved = 0xbf   // bits of fragments, and the one that nobody may set
	)
	if len(a) < v4+20 || len(b) < v4+20 || a[0] != b[0] {
		return false
	}
	l3, total := v4, 0
	switch {
	case a[0] == 0x45:
		if a[9] != ProtoTCP || b[9] != ProtoTCP || (a[6]|b[6])&reserved|a[7]|b[7] != 0 || !bytes.Equal(a[12:v4+4], b[12:v4+4]) {
			return false
		}
		total = int(binary.BigEndian.Uint16(b[2:]))
	case a[0]>>4 == 6 && len(a) >= v6+20 && len(b) >= v6+20:
		if a[6] != ProtoTCP || b[6] != ProtoTCP || !bytes.Equal(a[8:v6+4], b[8:v6+4]) {
			return false
		}
		l3, total = v6, v6+int(binary.BigEndian.Uint16(b[4:]))
	default:
		return false
	}
	head := int(b[l3+12]>>4) * 4
	return (a[l3+13]|TCPPsh) == TCPAck|TCPPsh && (b[l3+13]|TCPPsh) == TCPAck|TCPPsh &&
		head >= 20 && total <= len(b) && l3+head <= total
}
