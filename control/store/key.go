package store

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"io"
	"strconv"
	"strings"

	"mesh/control/wire"
)

// The text of a key is "mesh-KIND-ID-SECRET": SECRET is 32 random bytes in
// unpadded URL-safe base64. What is stored is the SHA-256 of those bytes; they
// are random, so there is nothing a salt or a slow hash would add.

const secretLen = 32

// newSecret returns the secret part of a key's text and the hash to store.
func newSecret() (text string, hash []byte, err error) {
	var b [secretLen]byte
	if _, err := io.ReadFull(rand.Reader, b[:]); err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:]), sum[:], nil
}

func keyText(kind KeyKind, id int64, secret string) string {
	return "mesh-" + string(kind) + "-" + strconv.FormatInt(id, 10) + "-" + secret
}

// parseKeyText takes a key's text apart. It accepts the canonical form only.
func parseKeyText(kind KeyKind, text string) (id int64, hash [sha256.Size]byte, ok bool) {
	rest, ok := strings.CutPrefix(text, "mesh-"+string(kind)+"-")
	if !ok || len(rest) > 80 {
		return 0, hash, false
	}
	num, secret, ok := strings.Cut(rest, "-")
	if !ok {
		return 0, hash, false
	}
	id, err := strconv.ParseInt(num, 10, 64)
	if err != nil || id <= 0 || strconv.FormatInt(id, 10) != num {
		return 0, hash, false
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(secret)
	if err != nil || len(b) != secretLen {
		return 0, hash, false
	}
	return id, sha256.Sum256(b), true
}

func sameHash(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

func errUnknownKey(kind KeyKind) error {
	if kind == KeyRelay {
		return wire.ErrRelayKeyUnknown
	}
	return wire.ErrAuthKeyUnknown
}
