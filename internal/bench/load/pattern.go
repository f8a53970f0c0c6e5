package load

import (
	"bytes"
	"fmt"
	"math/rand/v2"
)

// period is a prime, so that no byte that is out of place by a packet or by a
// power of two looks right.
const period = 65521

// pattern is what streams carry, twice, so that any chunk of up to a period is
// one slice of it.
var pattern = func() []byte {
	b := make([]byte, 2*period)
	rand.NewChaCha8([32]byte{1}).Read(b[:period])
	copy(b[period:], b[:period])
	return b
}()

// at returns n bytes, a period at most, of the stream from offset on.
func at(offset int64, n int) []byte {
	i := int(offset % period)
	return pattern[i : i+n]
}

// verify checks that b are the bytes of the stream from offset on.
func verify(b []byte, offset int64) error {
	for len(b) > 0 {
		n := min(len(b), period)
		if !bytes.Equal(b[:n], at(offset, n)) {
			return fmt.Errorf("the %d bytes at offset %d are not what was sent", n, offset)
		}
		b, offset = b[n:], offset+int64(n)
	}
	return nil
}
