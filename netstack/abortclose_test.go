package netstack

import (
	"errors"
	"io"
	"testing"
)

// An application that closes a connection the moment it hears that it was
// aborted does not make a regular end of it for the other side.
func TestCloseAfterAbortIsNoEnd(t *testing.T) {
	aborted := errors.New("aborted")
	a, b, _ := newPair(t, Config{})
	for range 50 {
		c1, c2 := connect(t, a, b, b4)
		go func() {
			c1.Read(make([]byte, 1))
			c1.Close()
		}()
		c1.fail(aborted) // what Abort does first
		_, err := c2.Read(make([]byte, 1))
		if err == nil || errors.Is(err, io.EOF) {
			t.Fatalf("the other side read %v", err)
		}
		c2.Close()
	}
}
