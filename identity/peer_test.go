package identity

import (
	"encoding/json"
	"testing"
)

func TestCapabilitiesOf(t *testing.T) {
	type tools struct{ Names []string }
	p := Peer{Name: "a.mesh.internal", Capabilities: map[string][]json.RawMessage{
		"example.com/cap/tools": {json.RawMessage(`{"names":["x"]}`), json.RawMessage(`{"names":["y","z"]}`)},
		"example.com/cap/plain": nil,
		"example.com/cap/bad":   {json.RawMessage(`7`)},
	}}
	got, err := CapabilitiesOf[tools](p, "example.com/cap/tools")
	if err != nil || len(got) != 2 || got[1].Names[1] != "z" {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := CapabilitiesOf[tools](p, "example.com/cap/plain"); got == nil || len(got) != 0 || err != nil {
		t.Errorf("without values: %v, %v", got, err)
	}
	if got, err := CapabilitiesOf[tools](p, "example.com/cap/none"); got != nil || err != nil {
		t.Errorf("not granted: %v, %v", got, err)
	}
	if _, err := CapabilitiesOf[tools](p, "example.com/cap/bad"); err == nil {
		t.Error("a wrong shape was accepted")
	}
}

func TestStrings(t *testing.T) {
	p := Peer{Name: "db.mesh.internal", Tags: []string{"tag:db"}, Rule: Rule{Policy: 3, Name: "acls[2]", Line: 14}}
	if p.ShortName() != "db" || p.String() != "db.mesh.internal (tag:db)" || !p.HasTag("tag:db") || p.HasTag("tag:x") {
		t.Errorf("%v %q", p, p.ShortName())
	}
	if got := p.Rule.String(); got != "acls[2] (line 14, policy 3)" {
		t.Error(got)
	}
	if got := (Rule{}).String(); got != "" {
		t.Error(got)
	}
	if got := (Peer{Name: "x", User: "alice@example.com"}).String(); got != "x (alice@example.com)" {
		t.Error(got)
	}
}
