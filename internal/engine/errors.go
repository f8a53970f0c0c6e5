package engine

import (
	"errors"
	"fmt"

	"mesh/identity"
)

// ErrDenied matches every DeniedError.
var ErrDenied = errors.New("denied by policy")

// ErrRevoked matches every RevokedError.
var ErrRevoked = errors.New("access revoked")

// DeniedError reports that the policy in force at a peer refused a connection
// or a datagram.
type DeniedError struct {
	Peer   identity.Peer // who refused
	Proto  string        // "tcp" or "udp"
	Port   uint16        // the port at the peer
	Policy int64         // the version of the policy by which it refused, 0 = it did not say
	Reason string        // "not allowed by policy", or "shields up"
}

func (e *DeniedError) Error() string {
	s := fmt.Sprintf("%s refused %s port %d: %s", e.Peer.Name, e.Proto, e.Port, e.Reason)
	if e.Policy > 0 {
		s += fmt.Sprintf(" (policy version %d)", e.Policy)
	}
	return s
}

// Is makes errors.Is(err, ErrDenied) true.
func (e *DeniedError) Is(target error) bool { return target == ErrDenied }

// RevokedError ends connections that were allowed and no longer are, at both
// ends.
type RevokedError struct {
	Peer   identity.Peer // the other end; zero when this node itself was removed
	Policy int64         // the policy version that withdrew the access, 0 = unknown
	Reason string        // why, for people
}

// Reasons of a RevokedError.
const (
	reasonPolicy     = "the policy no longer allows it"
	reasonLeft       = "it has left the mesh or may no longer be reached"
	reasonExpired    = "its key expired"
	reasonSelfOwner  = "the owner or the tags of this node changed"
	reasonSelfExpiry = "the key of this node expired"
	reasonSelfLeft   = "it may not be reached any more"
)

func (e *RevokedError) Error() string {
	s := "access revoked"
	if e.Peer.Name != "" {
		s = "access to and from " + e.Peer.Name + " revoked"
	}
	switch {
	case e.Reason == reasonPolicy && e.Policy > 0:
		return s + fmt.Sprintf(": policy version %d no longer allows it", e.Policy)
	case e.Reason != "":
		s += ": " + e.Reason
	}
	if e.Policy > 0 {
		s += fmt.Sprintf(" (policy version %d)", e.Policy)
	}
	return s
}

// Is makes errors.Is(err, ErrRevoked) true.
func (e *RevokedError) Is(target error) bool { return target == ErrRevoked }
