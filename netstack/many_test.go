package netstack

import (
	"io"
	"sync"
	"testing"
)

// Many streams at once all come to their end: the more connections there are, the
// less each may hold, and those that are there when another comes go on.
func TestManyStreams(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	const streams, size = 24, 12 << 20
	var wg sync.WaitGroup
	for i := range streams {
		ca, cb := connect(t, a, b, b4)
		wg.Go(func() {
			if _, err := ca.Write(make([]byte, size)); err != nil {
				t.Error(i, err)
			}
			ca.CloseWrite()
		})
		wg.Go(func() {
			if n, err := io.Copy(io.Discard, cb); n != size || err != nil {
				t.Errorf("stream %d: %d bytes, %v", i, n, err)
			}
		})
	}
	wg.Wait()
}
