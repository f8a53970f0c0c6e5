package derp

import (
	"crypto/ecdh"
	"encoding/json"
	"fmt"

	"mesh/identity"
)

// ClientInfo is what a client tells about itself in its box at login.
type ClientInfo struct {
	Version     int    `json:"version,omitempty"`     // of the protocol
	CanAckPings bool   `json:"CanAckPings,omitempty"` // it answers pings of the relay
	MeshKey     string `json:"meshKey,omitempty"`     // secret shared by relays of one region
	IsProber    bool   `json:"IsProber,omitempty"`    // it measures, and is no node
	AppName     string `json:"AppName,omitempty"`     // a label for statistics
}

// ServerInfo is what a relay answers when it has admitted a client.
type ServerInfo struct {
	Version int `json:"version,omitempty"` // of the protocol
	// The client shall send no more than this, counted in bytes of frames; 0 = no limit.
	TokenBucketBytesPerSecond int `json:"TokenBucketBytesPerSecond,omitempty"`
	TokenBucketBytesBurst     int `json:"TokenBucketBytesBurst,omitempty"`
}

// ServerKeyPayload returns the payload of a FrameServerKey.
func ServerKeyPayload(relay identity.NodePublic) []byte {
	key := relay.Bytes()
	return append([]byte(Magic), key[:]...)
}

// ParseServerKey reads the payload of a FrameServerKey; further bytes are
// ignored. The error matches ErrProtocol.
func ParseServerKey(payload []byte) (identity.NodePublic, error) {
	if len(payload) < len(Magic)+identity.KeyLen || string(payload[:len(Magic)]) != Magic {
		return identity.NodePublic{}, fmt.Errorf("%w: malformed relay key", ErrProtocol)
	}
	key := identity.NodePublicFrom([identity.KeyLen]byte(payload[len(Magic):]))
	if key.IsZero() {
		return identity.NodePublic{}, fmt.Errorf("%w: zero relay key", ErrProtocol)
	}
	return key, nil
}

// SealClientInfo returns the payload of the FrameClientInfo with which the
// owner of priv logs in at a relay.
func SealClientInfo(priv identity.NodePrivate, relay identity.NodePublic, info ClientInfo) []byte {
	key := priv.Public().Bytes()
	return seal(key[:], priv.Shared(relay), info)
}

// OpenClientInfo reads the payload of a FrameClientInfo at the relay that owns
// priv. The key it returns without error is proven: only its owner can have
// made the box. The error matches ErrProtocol.
func OpenClientInfo(priv identity.NodePrivate, payload []byte) (identity.NodePublic, ClientInfo, error) {
	var info ClientInfo
	key, sealed, ok := SplitKey(payload)
	if !ok || key.IsZero() {
		return identity.NodePublic{}, info, fmt.Errorf("%w: malformed client info", ErrProtocol)
	}
	if lowOrder(priv, key) {
		return identity.NodePublic{}, info, fmt.Errorf("%w: client key of low order", ErrProtocol)
	}
	if err := open(priv.Shared(key), sealed, &info); err != nil {
		return identity.NodePublic{}, info, fmt.Errorf("%w: client info: %w", ErrProtocol, err)
	}
	return key, info, nil
}

// lowOrder reports whether key is one of the few points with which every
// private key shares the same secret, so that a box would prove nothing.
func lowOrder(priv identity.NodePrivate, key identity.NodePublic) bool {
	secret, point := priv.Bytes(), key.Bytes()
	k, err := ecdh.X25519().NewPrivateKey(secret[:])
	if err != nil {
		return true
	}
	p, err := ecdh.X25519().NewPublicKey(point[:])
	if err != nil {
		return true
	}
	_, err = k.ECDH(p)
	return err != nil
}

// SealServerInfo returns the payload of the FrameServerInfo from the relay
// that owns priv to a client.
func SealServerInfo(priv identity.NodePrivate, client identity.NodePublic, info ServerInfo) []byte {
	return seal(nil, priv.Shared(client), info)
}

// OpenServerInfo reads the payload of a FrameServerInfo at the client that
// owns priv. The error matches ErrProtocol.
func OpenServerInfo(priv identity.NodePrivate, relay identity.NodePublic, payload []byte) (ServerInfo, error) {
	var info ServerInfo
	if err := open(priv.Shared(relay), payload, &info); err != nil {
		return ServerInfo{}, fmt.Errorf("%w: relay info: %w", ErrProtocol, err)
	}
	return info, nil
}

func seal(prefix []byte, box *identity.Shared, info any) []byte {
	msg, err := json.Marshal(info)
	if err != nil {
		panic("derp: " + err.Error()) // plain structs always encode
	}
	return box.Seal(prefix, msg)
}

func open(box *identity.Shared, sealed []byte, info any) error {
	msg, ok := box.Open(nil, sealed)
	if !ok {
		return fmt.Errorf("box does not open")
	}
	return json.Unmarshal(msg, info)
}
