// Package stun implements the small part of STUN that mesh networks use: a
// client asks a relay by UDP under which address and port the relay sees it,
// so that it can tell its peers. There is one request form, one response
// attribute, no authentication and no retransmission; see RFC 5389 for the
// message format.
//
// Parsing and building allocate nothing when the caller supplies the buffer.
package stun

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net/netip"
)

// Sizes of messages in bytes.
const (
	// RequestLen is the length of every request that AppendRequest builds.
	RequestLen = headerLen + attrHeaderLen + len(marker) + fingerprintLen
	// ResponseLen4 is the length of a response that carries an IPv4 address.
	ResponseLen4 = headerLen + attrHeaderLen + 8
	// ResponseLen6 is the length of a response that carries an IPv6 address.
	ResponseLen6 = headerLen + attrHeaderLen + 20
)

const (
	headerLen      = 20
	attrHeaderLen  = 4
	fingerprintLen = attrHeaderLen + 4

	magicCookie = 0x2112A442
	// fingerprintXOR distinguishes the fingerprint from a plain CRC-32.
	fingerprintXOR = 0x5354554E
	// marker is the SOFTWARE text that relays of this protocol family answer
	// to; requests without it stay unanswered.
	marker = "tailnode"

	typeRequest = 0x0001
	typeSuccess = 0x0101

	attrMapped       = 0x0001
	attrXorMapped    = 0x0020
	attrXorMappedAlt = 0x8020
	attrSoftware     = 0x8022
	attrFingerprint  = 0x8028

	familyIPv4 = 1
	familyIPv6 = 2
)

// Errors of the parsers. Whoever reads from a socket ignores the message in
// either case; the distinction is for tests and logs.
var (
	// ErrMalformed reports bytes that are no STUN message of the kind asked for.
	ErrMalformed = errors.New("stun: malformed message")
	// ErrNotOurs reports a well-formed request without the marker or with a
	// missing or wrong fingerprint: it must not be answered.
	ErrNotOurs = errors.New("stun: request is not marked as ours")
)

// TxID is the transaction id that ties a response to its request.
type TxID [12]byte

// NewTxID returns a random transaction id; guessing it is what an off-path
// attacker would have to do to forge a response.
func NewTxID() TxID {
	var tx TxID
	rand.Read(tx[:]) // never fails, see crypto/rand
	return tx
}

// IsSTUN reports whether a datagram from a socket shared with WireGuard and
// path discovery is to be treated as STUN. It looks at the header only.
func IsSTUN(b []byte) bool {
	return len(b) >= headerLen &&
		b[0]&0xC0 == 0 && b[1] == 0x01 &&
		binary.BigEndian.Uint32(b[4:]) == magicCookie
}

// AppendRequest appends the request with transaction id tx to dst: always
// RequestLen bytes in exactly the form that relays demand.
func AppendRequest(dst []byte, tx TxID) []byte {
	start := len(dst)
	dst = appendHeader(dst, typeRequest, RequestLen-headerLen, tx)
	dst = binary.BigEndian.AppendUint16(dst, attrSoftware)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(marker)))
	dst = append(dst, marker...)
	sum := fingerprint(dst[start:])
	dst = binary.BigEndian.AppendUint16(dst, attrFingerprint)
	dst = binary.BigEndian.AppendUint16(dst, 4)
	return binary.BigEndian.AppendUint32(dst, sum)
}

// ParseRequest returns the transaction id of a request that a relay may
// answer: a Binding Request with our SOFTWARE marker whose last attribute is a
// correct FINGERPRINT.
func ParseRequest(b []byte) (TxID, error) {
	if !IsSTUN(b) || binary.BigEndian.Uint16(b) != typeRequest {
		return TxID{}, ErrMalformed
	}
	if int(binary.BigEndian.Uint16(b[2:])) != len(b)-headerLen {
		return TxID{}, ErrMalformed
	}
	var marked, printed bool
	for rest := b[headerLen:]; len(rest) > 0; {
		typ, value, next, ok := nextAttr(rest)
		if !ok {
			return TxID{}, ErrMalformed
		}
		printed = false // only the last attribute counts
		switch typ {
		case attrSoftware:
			marked = marked || string(value) == marker
		case attrFingerprint:
			printed = len(value) == 4 &&
				binary.BigEndian.Uint32(value) == fingerprint(b[:len(b)-fingerprintLen])
		}
		rest = next
	}
	if !marked || !printed {
		return TxID{}, ErrNotOurs
	}
	return TxID(b[8:headerLen]), nil
}

// AppendResponse appends the answer to request tx from source src to dst.
// An IPv4 address in IPv6 form is reported as IPv4. It panics when src is not
// valid: the source of a received datagram always is.
func AppendResponse(dst []byte, tx TxID, src netip.AddrPort) []byte {
	ip := src.Addr().Unmap()
	if !ip.IsValid() {
		panic("stun: response for an invalid address")
	}
	size, family := 8, byte(familyIPv4)
	if ip.Is6() {
		size, family = 20, familyIPv6
	}
	dst = appendHeader(dst, typeSuccess, attrHeaderLen+size, tx)
	dst = binary.BigEndian.AppendUint16(dst, attrXorMapped)
	dst = binary.BigEndian.AppendUint16(dst, uint16(size))
	dst = append(dst, 0, family)
	dst = binary.BigEndian.AppendUint16(dst, src.Port()^(magicCookie>>16))
	pad := xorPad(tx)
	if ip.Is4() {
		a := ip.As4()
		for i := range a {
			dst = append(dst, a[i]^pad[i])
		}
		return dst
	}
	a := ip.As16()
	for i := range a {
		dst = append(dst, a[i]^pad[i])
	}
	return dst
}

// ParseResponse returns the transaction id of a response and the address under
// which the relay saw the request. The caller must match the id to a request
// of its own before it believes the address.
func ParseResponse(b []byte) (TxID, netip.AddrPort, error) {
	if !IsSTUN(b) || binary.BigEndian.Uint16(b) != typeSuccess {
		return TxID{}, netip.AddrPort{}, ErrMalformed
	}
	size := int(binary.BigEndian.Uint16(b[2:]))
	if size > len(b)-headerLen {
		return TxID{}, netip.AddrPort{}, ErrMalformed
	}
	tx := TxID(b[8:headerLen])
	var best netip.AddrPort
	for rest := b[headerLen : headerLen+size]; len(rest) > 0; {
		typ, value, next, ok := nextAttr(rest)
		if !ok {
			return TxID{}, netip.AddrPort{}, ErrMalformed
		}
		switch typ {
		case attrXorMapped, attrXorMappedAlt:
			ap, ok := parseAddr(value, magicCookie>>16, xorPad(tx))
			if !ok {
				return TxID{}, netip.AddrPort{}, ErrMalformed
			}
			return tx, ap, nil
		case attrMapped:
			ap, ok := parseAddr(value, 0, [16]byte{})
			if !ok {
				return TxID{}, netip.AddrPort{}, ErrMalformed
			}
			if !best.IsValid() {
				best = ap
			}
		}
		rest = next
	}
	if !best.IsValid() {
		return TxID{}, netip.AddrPort{}, ErrMalformed
	}
	return tx, best, nil
}

func appendHeader(dst []byte, typ uint16, size int, tx TxID) []byte {
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint16(dst, uint16(size))
	dst = binary.BigEndian.AppendUint32(dst, magicCookie)
	return append(dst, tx[:]...)
}

// nextAttr splits the first attribute off b; values are padded to four bytes.
// The padding of the last attribute may be missing.
func nextAttr(b []byte) (typ uint16, value, next []byte, ok bool) {
	if len(b) < attrHeaderLen {
		return 0, nil, nil, false
	}
	typ = binary.BigEndian.Uint16(b)
	n := int(binary.BigEndian.Uint16(b[2:]))
	b = b[attrHeaderLen:]
	if n > len(b) {
		return 0, nil, nil, false
	}
	return typ, b[:n], b[min((n+3)&^3, len(b)):], true
}

func parseAddr(value []byte, xorPort uint16, pad [16]byte) (netip.AddrPort, bool) {
	if len(value) < 4 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(value[2:]) ^ xorPort
	raw := value[4:]
	switch {
	case value[1] == familyIPv4 && len(raw) == 4:
		a := [4]byte(raw)
		for i := range a {
			a[i] ^= pad[i]
		}
		return netip.AddrPortFrom(netip.AddrFrom4(a), port), true
	case value[1] == familyIPv6 && len(raw) == 16:
		a := [16]byte(raw)
		for i := range a {
			a[i] ^= pad[i]
		}
		return netip.AddrPortFrom(netip.AddrFrom16(a).Unmap(), port), true
	}
	return netip.AddrPort{}, false
}

// xorPad is what addresses are hidden with: the magic cookie and the
// transaction id, so that middleboxes do not rewrite them.
func xorPad(tx TxID) (pad [16]byte) {
	binary.BigEndian.PutUint32(pad[:], magicCookie)
	copy(pad[4:], tx[:])
	return pad
}

// fingerprint covers everything before the FINGERPRINT attribute, whose own
// size the header already counts.
func fingerprint(b []byte) uint32 { return crc32.ChecksumIEEE(b) ^ fingerprintXOR }
