package load

import (
	"bytes"
	"testing"
)

func TestVerify(t *testing.T) {
	var stream []byte
	for len(stream) < 4*period {
		stream = append(stream, at(int64(len(stream)), 10007)...)
	}
	for _, offset := range []int{0, 1, period - 1, period, 100_000} {
		b := bytes.Clone(stream[offset:])
		if err := verify(b, int64(offset)); err != nil {
			t.Errorf("offset %d: %v", offset, err)
		}
		b[len(b)-1] ^= 1
		if verify(b, int64(offset)) == nil {
			t.Errorf("offset %d: a wrong byte passed", offset)
		}
		if verify(stream[offset+1208:], int64(offset)) == nil {
			t.Errorf("offset %d: a lost packet passed", offset)
		}
	}
}
