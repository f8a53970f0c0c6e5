package policy

import (
	"encoding/json"
	"strings"

	"github.com/tailscale/hujson"
)

// companions are capabilities that bring another one for the sources of the
// grant, at their side. Only the first of each can be granted in so many words.
var companions = []struct{ name, brings string }{
	{"tailscale.com/cap/drive", "tailscale.com/cap/drive-sharer"},
	{"tailscale.com/cap/relay", "tailscale.com/cap/relay-target"},
}

// grantable are the capabilities of the reserved domain that policies may grant;
// the others come from the control server alone.
var grantable = map[string]bool{
	"tailscale.com/cap/drive": true, "tailscale.com/cap/relay": true, "tailscale.com/cap/webui": true,
	"tailscale.com/cap/kubernetes": true, "tailscale.com/cap/tsidp": true, "tailscale.com/cap/secrets": true,
	"tailscale.com/cap/golink": true,
}

// capabilities reads an object of capability names with lists of any JSON.
// The reserved domain is open where the control server itself reads them.
func (r *reader) capabilities(v hujson.Value, what string, reserved bool) map[string][]json.RawMessage {
	out := make(map[string][]json.RawMessage)
	for _, m := range r.members(v, what) {
		domain, path, ok := strings.Cut(m.name, "/")
		switch {
		case !ok || domain == "" || path == "" || strings.ContainsAny(m.name, " \t\r\n") || strings.Contains(m.name, "://"):
			r.fail(m.nameAt, `like "example.com/cap/tools"`, "capability name %q must have the form {domain}/{path}", m.name)
			continue
		case !reserved && domain == "tailscale.com" && !grantable[m.name]:
			r.fail(m.nameAt, "use a domain of your own", "capability name %q must not be in the tailscale.com domain", m.name)
			continue
		}
		if isNull(m.value) {
			out[m.name] = nil // a name without values
			continue
		}
		values := []json.RawMessage{}
		for _, v := range r.array(m.value, m.name) {
			values = append(values, plainJSON(v))
		}
		out[m.name] = values
	}
	return out
}

// plainJSON is a value without comments and blanks.
func plainJSON(v hujson.Value) json.RawMessage {
	v = v.Clone()
	v.BeforeExtra, v.AfterExtra = nil, nil
	v.Minimize()
	return json.RawMessage(v.Pack())
}
