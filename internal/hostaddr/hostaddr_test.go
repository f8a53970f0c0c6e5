package hostaddr

import (
	"net/netip"
	"slices"
	"testing"
)

func TestUpListsLoopback(t *testing.T) {
	list, err := Up()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(list, netip.MustParsePrefix("127.0.0.1/8")) {
		t.Errorf("no loopback in %v", list)
	}
}
