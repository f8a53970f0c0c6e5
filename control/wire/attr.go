package wire

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// Attributes of a node by which policies set times. What follows the colon is a
// time as ParseSpan reads it, or "never".
const (
	// AttrKeyExpiry is how long the node's keys are good for.
	AttrKeyExpiry = "key-expiry:"
	// AttrMaxStale is how long the node goes on without its control server.
	AttrMaxStale = "max-stale:"
)

const maxSpan = 100 * 365 * 24 * time.Hour

// ParseSpan reads a positive time, 100 years at most, with days besides the
// units of package time: "90m", "24h", "30d".
func ParseSpan(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); err != nil && ok {
		var n uint64
		if n, err = strconv.ParseUint(days, 10, 16); err == nil {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	if err != nil || d <= 0 || d > maxSpan {
		return 0, errors.New("want a time like 90m, 24h or 30d")
	}
	return d, nil
}

// AttrSpan reads the attribute of that name, such as AttrMaxStale; 0 is never.
// It reports false for other attributes, and for what cannot be read.
func AttrSpan(attr, name string) (time.Duration, bool) {
	s, ok := strings.CutPrefix(attr, name)
	if !ok {
		return 0, false
	}
	if s == "never" {
		return 0, true
	}
	d, err := ParseSpan(s)
	return d, err == nil
}
