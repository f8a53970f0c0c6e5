package interop

import (
	"os"
	"regexp"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// complaint is what a stock node writes when it does not understand a message.
var complaint = regexp.MustCompile(`(?i)(un)?marshal|json:|decod(e|ing) |invalid character|unknown field|malformed|unexpected EOF.*netmap|panic`)

// complains returns the first line of the stock node's log that is about a
// message which it does not understand, "" if there is none.
func (n *stockNode) complains() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		n.t.Fatal(err)
	}
	at := complaint.FindIndex(b)
	if at == nil {
		return ""
	}
	return string(b[max(0, at[0]-200):min(len(b), at[1]+200)])
}

// A stock node gets all that our server adds to its maps (MeshOrigins in filter
// rules, MeshPolicy, the groups of users, and MeshCode with a last map when it
// is removed), is sent rejections of forms that stock nodes do not send, and
// goes on as if there were nothing of it.
func TestStockIgnoresExtras(t *testing.T) {
	m := meshtest.Start(t, narrowPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)

	// That they are there: our node learns rule and version by them.
	ln := ours.listen(":81")
	m.SetPolicy(`{
		"tagOwners": {"tag:a": [], "tag:s": []},
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:80,81"]}]}`)
	until(t, "the new policy to let the stock node in", func() bool {
		return laptop.try("open", map[string]any{"Name": "rule", "Addr": port(ours, false, 81), "Seconds": 2}, nil) == nil
	})
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p, ok := mesh.PeerOf(c); !ok || p.Rule.Name != "acls[0]" || p.Rule.Policy == 0 || p.Rule.ID == "" {
		t.Errorf("the rule at ours: %+v", p.Rule)
	}
	// The rejection of UDP and of IPv6, and the one of an established flow.
	for _, six := range []bool{false, true} {
		if _, err := laptop.datagram(port(ours, six, 7), "x", 1); err == nil {
			t.Error("UDP was not denied")
		}
		if err := laptop.try("open", map[string]any{"Name": "x", "Addr": port(ours, six, 7), "Seconds": 1}, nil); err == nil {
			t.Error("TCP was not denied")
		}
	}
	m.SetPolicy(narrowPolicy)
	var why string
	laptop.do("await", map[string]any{"Name": "rule"}, &why)
	t.Logf("the flow that the policy cut ended with %q at the stock node", why)
	for _, six := range []bool{false, true} {
		whoAmI(t, laptop, ours, six)
		whoAmI(t, ours, laptop, six)
	}
	if polls := laptop.polls(); polls != 1 {
		t.Errorf("%d map polls", polls)
	}
	if err := m.Admin.RemoveNode(t.Context(), "laptop"); err != nil {
		t.Fatal(err)
	}
	laptop.state("NeedsLogin")
	laptop.do("login", map[string]any{"AuthKey": keyForStock(m)}, nil)
	laptop.state("Running")
	laptop.up()
	know(t, laptop, ours)
	whoAmI(t, laptop, ours, false)
	if c := laptop.complains(); c != "" {
		t.Errorf("the stock node complains: …%s…", c)
	}
}
