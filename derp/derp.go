// Package derp speaks the DERP relay protocol from the side of a node: a
// Client is one logged-in connection to one relay over which packets go to
// and come from other nodes, addressed by their node keys. Conn, the framing
// with its bounded queues, serves both sides; the relay is package relay.
//
// A relay sees only what the nodes encrypted, and delivery is best effort:
// queues are short and drop their oldest packets first. A Client does not
// reconnect; whoever owns it decides when and where to dial again.
package derp

import (
	"errors"
	"fmt"
	"time"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrNotAdmitted reports that the relay closed the connection after it
	// learned our key. The protocol has no message for a refusal, so a relay
	// that goes down in this very moment looks the same.
	ErrNotAdmitted = errors.New("relay did not admit this node key")
	// ErrPin reports that a relay did not present the one certificate its
	// address pins.
	ErrPin = errors.New("certificate does not match the pin")
	// ErrRelayKey reports a relay whose key is not ClientConfig.RelayKey.
	ErrRelayKey = errors.New("not the relay that was expected")
	// ErrProtocol reports a peer that broke the protocol.
	ErrProtocol = errors.New("protocol violation")
	// ErrFrameTooLarge reports a frame longer than the protocol allows.
	// It also matches ErrProtocol.
	ErrFrameTooLarge = fmt.Errorf("%w: frame too large", ErrProtocol)
	// ErrPacketTooLarge reports a packet over MaxPacket bytes: a bug of the sender.
	ErrPacketTooLarge = errors.New("packet too large for a relay")
	// ErrTimeout reports that nothing came from the relay for the keep-alive
	// time-out: the connection is dead.
	ErrTimeout = errors.New("relay is silent")
)

// Target says where a relay is and how to recognise it. It is derived from a
// node entry of the relay map.
type Target struct {
	// Region is the number of the relay's region; it labels errors and logs.
	Region int
	// Name is the node's name in the relay map, a label too.
	Name string
	// HostName is the name (or IP literal) sent as TLS server name and HTTP
	// host and, with an empty CertName, the name the certificate must carry.
	HostName string
	// CertName says how to verify the certificate instead: another DNS name,
	// or "sha256-raw:" and 64 hexadecimal digits, the SHA-256 of the whole
	// certificate. Empty means HostName.
	CertName string
	// Addr is the host:port to dial.
	Addr string
	// InsecureForTests skips the verification of the certificate (a pin is
	// still checked).
	InsecureForTests bool
	// PlainHTTP skips TLS altogether. For tests.
	PlainHTTP bool
}

// String returns the form used in errors: "relay 900".
func (t Target) String() string { return fmt.Sprintf("relay %d", t.Region) }

// Stage names a step of connecting to a relay.
type Stage string

// The stages of Dial, in this order.
const (
	StageDial    Stage = "dial"    // TCP
	StageTLS     Stage = "tls"     // TLS handshake and certificate
	StageUpgrade Stage = "upgrade" // HTTP request
	StageLogin   Stage = "login"   // proof of the node key, admission
)

// DialError says at which stage the connection to which relay failed, as in
// "relay 900: dial 127.0.0.1:443: connection refused".
type DialError struct {
	Target Target
	Stage  Stage
	Err    error
}

func (e *DialError) Error() string {
	if e.Stage == StageDial {
		return fmt.Sprintf("%v: dial %s: %v", e.Target, e.Target.Addr, e.Err)
	}
	return fmt.Sprintf("%v: %s: %v", e.Target, e.Stage, e.Err)
}

// Unwrap returns the cause.
func (e *DialError) Unwrap() error { return e.Err }

// Defaults of the protocol, used where a configuration says 0.
const (
	// DefaultDialTimeout bounds TCP, TLS, upgrade and login together.
	DefaultDialTimeout = 10 * time.Second
	// DefaultIdleTimeout is how long a client waits for any frame, about two
	// of the relay's keep-alives.
	DefaultIdleTimeout = 120 * time.Second
	// DefaultWriteTimeout is how long a client lets one write to the relay
	// take before it calls the connection dead.
	DefaultWriteTimeout = 10 * time.Second
)

// PeerGoneReason says why a relay does not reach a peer.
type PeerGoneReason byte

// The reasons on the wire.
const (
	PeerDisconnected PeerGoneReason = 0 // it was here and left
	PeerNotHere      PeerGoneReason = 1 // it is not connected to this relay
)

// String returns a word for logs.
func (r PeerGoneReason) String() string {
	switch r {
	case PeerDisconnected:
		return "disconnected"
	case PeerNotHere:
		return "not here"
	}
	return fmt.Sprintf("reason %d", byte(r))
}
