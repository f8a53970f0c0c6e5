package wire

import (
	"testing"
	"time"
)

func TestAttrSpan(t *testing.T) {
	for attr, want := range map[string]time.Duration{
		"key-expiry:30d": 30 * 24 * time.Hour, "key-expiry:never": 0, "key-expiry:90m": 90 * time.Minute,
		"key-expiry:": -1, "key-expiry:0s": -1, "key-expiry:-1h": -1, "key-expiry:99999d": -1, "key-expiry:1x": -1,
		"max-stale:1h": -1, "key-expiry": -1,
	} {
		got, ok := AttrSpan(attr, AttrKeyExpiry)
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%s: %v, %v", attr, got, ok)
		}
	}
}
