package policy

import (
	"strings"
	"testing"
	"time"
)

func TestKeyLife(t *testing.T) {
	p, err := Parse([]byte(`{
		"groups": {"group:ops": ["alice@"]},
		"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
		"nodeAttrs": [
			{"target": ["autogroup:member"], "attr": ["key-expiry:30d"]},
			{"target": ["group:ops"], "attr": ["funnel", "key-expiry:7d"]},
			{"target": ["tag:a"], "attr": ["key-expiry:never"]},
			{"target": ["tag:a", "tag:b"], "attr": ["key-expiry:2h"]},
			{"target": ["tag:c"], "attr": ["key-expiry:never", "max-stale:5m"]},
		],
	}`))
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	for _, c := range []struct {
		node Node
		want time.Duration
		ok   bool
	}{
		{Node{User: "bob"}, 30 * day, true},
		{Node{User: "alice"}, 7 * day, true},
		{Node{Tags: []string{"tag:a"}}, 2 * time.Hour, true},
		{Node{Tags: []string{"tag:c"}}, 0, true},
		{Node{Tags: []string{"tag:d"}}, 0, false},
	} {
		if got, ok := p.KeyLife(c.node); got != c.want || ok != c.ok {
			t.Errorf("%+v: %v, %v", c.node, got, ok)
		}
	}
	for _, attr := range []string{"key-expiry:soon", "max-stale:", "key-expiry:-1h"} {
		_, err := Parse([]byte(`{"nodeAttrs": [{"target": ["*"], "attr": ["` + attr + `"]}]}`))
		if err == nil || !strings.Contains(err.Error(), attr) {
			t.Errorf("%s: %v", attr, err)
		}
	}
}
