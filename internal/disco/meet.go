package disco

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// TypeMeet is a message of ours, see EXTENSIONS.md. Stock peers ignore types
// that they do not know; the number is far from those of the protocol.
const TypeMeet Type = 0xE5

// Phase says which step of a meeting a Meet is.
type Phase byte

// The steps, in order.
const (
	MeetAsk    Phase = 1 // let us begin together: here are my endpoints
	MeetAnswer Phase = 2 // yes: here are mine
	MeetStart  Phase = 3 // begin when you read this
	MeetGuess  Phase = 4 // that was no use: I opened many ports, guess one
)

// Meet has two nodes ping each other for the first time at the same moment. It
// is sent by relay only.
type Meet struct {
	Phase Phase
	ID    TxID // of the meeting, chosen by who asks
	// Delay is how long who answers took to do so, to be taken off the round
	// trip. In microseconds on the wire.
	Delay     time.Duration
	Endpoints []netip.AddrPort // of the sender; none with MeetStart
}

// Type implements Message.
func (Meet) Type() Type { return TypeMeet }

const meetLen = 1 + txLen + 4

func (m Meet) appendPayload(b []byte) []byte {
	b = append(append(b, byte(m.Phase)), m.ID[:]...)
	us := min(max(m.Delay, 0), time.Hour) / time.Microsecond
	b = binary.BigEndian.AppendUint32(b, uint32(us))
	return CallMeMaybe{m.Endpoints}.appendPayload(b)
}

func parseMeet(b []byte) (Message, error) {
	if len(b) < meetLen {
		return nil, ErrShort
	}
	m := Meet{Phase: Phase(b[0]), ID: TxID(b[1:])}
	if m.Phase < MeetAsk || m.Phase > MeetGuess {
		return nil, ErrUnknownType
	}
	m.Delay = min(time.Duration(binary.BigEndian.Uint32(b[1+txLen:]))*time.Microsecond, time.Hour)
	body := b[meetLen:]
	body = body[:len(body)/addrLen*addrLen] // what follows belongs to later versions
	call, err := parseCallMeMaybe(body)
	if err != nil {
		return nil, err
	}
	m.Endpoints = call.(CallMeMaybe).Endpoints
	return m, nil
}
