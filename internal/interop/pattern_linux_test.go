package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
)

// pattern is the endless stream of bytes that the stock program has, too.
func pattern() io.Reader { return &stream{state: 1} }

type stream struct{ state uint64 }

func (p *stream) Read(b []byte) (int, error) {
	for i := range b {
		p.state = p.state*6364136223846793005 + 1442695040888963407
		b[i] = byte(p.state >> 56)
	}
	return len(b), nil
}

// sumOf is the SHA-256 of the first n bytes of the pattern.
func sumOf(n int64) string {
	s, _ := sumFrom(io.LimitReader(pattern(), n))
	return s
}

// sumFrom returns the SHA-256 of what r has.
func sumFrom(r io.Reader) (string, error) {
	h := sha256.New()
	_, err := io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), err
}
