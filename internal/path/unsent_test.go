package path

import (
	"testing"
	"time"
)

func TestUnsentKeepsTheNewestForAWhile(t *testing.T) {
	var u unsent
	for i := range 10 {
		u.keep([][]byte{{byte(i)}, make([]byte, maxUnsentSize+1)}, time.Second)
	}
	got := u.take(2 * time.Second)
	if len(got) != maxUnsent || got[0][0] != 6 || got[3][0] != 9 {
		t.Errorf("kept %v", got)
	}
	if u.take(2*time.Second) != nil {
		t.Error("given out twice")
	}
	u.keep([][]byte{{1}}, time.Second)
	if u.take(time.Second+unsentFor) != nil {
		t.Error("stale datagrams are sent")
	}
}
