package stock

import "io"

// Pattern is an endless stream of bytes that both ends know: a linear
// congruential sequence, so that lost and repeated pieces show.
func Pattern() io.Reader { return &pattern{state: 1} }

type pattern struct{ state uint64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		p.state = p.state*6364136223846793005 + 1442695040888963407
		b[i] = byte(p.state >> 56)
	}
	return len(b), nil
}
