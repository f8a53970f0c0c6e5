package policy

import (
	"bytes"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"mesh/control/wire"
)

// Hostile files end in an error or a policy in bounded memory (negative test 33).
func TestHostileFiles(t *testing.T) {
	var many strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&many, `"u%d@x",`, i)
	}
	users := many.String()
	oneLine := `{"acls": [` + strings.Repeat(`{"dst":["*:*"],"src":["a@"],"action":"accept"},`, 40_000) + `]}`
	undefined := strings.ReplaceAll(users, "@x", "")
	for _, tt := range []struct {
		name, text, want string
	}{
		{"2 MB of brackets", strings.Repeat("[", 2<<20), "more than 64 levels of nesting at line 1, column 65"},
		{"2 MB of braces", strings.Repeat(`{"a":`, 400_000), "more than 64 levels of nesting at line 1, column 321"},
		{"64 levels", `{"x":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + "}", `unknown member "x" at line 1, column 2`},
		{"65 levels", `{"x":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + "}", "more than 64 levels of nesting at line 1, column 69"},
		{"brackets in strings and comments do not count", `{/* ` + strings.Repeat("[", 99) + " */ // " + strings.Repeat("[", 99) + "\n" + `"\"` + strings.Repeat("[", 99) + `": 1}`, `unknown member "\"` + strings.Repeat("[", 99) + `" at line 2, column 1`},
		{"10 MB", strings.Repeat(" ", 10<<20), "policy is longer than 4194304 bytes at line 1, column 1"},
		{"too many values", `{"acls": [` + strings.Repeat("1,", 1_000_000) + "]}", "more than 400000 values"},
		{"million rules", `{"acls": [` + strings.Repeat("{},", 1_000_000) + "]}", "more than 400000 values"},
		{"100,000 errors", `{"groups": {"group:a": [` + undefined + `]}}`, "and more than 50 errors in all"},
		{"unclosed string", `{"` + strings.Repeat("a", 1<<20), "unexpected EOF"},
		{"unclosed comment", `{/*` + strings.Repeat("[", 1<<20), "unexpected EOF"},
		{"100,000 members", `{"groups": {"group:a": [` + users + `]}}`, ""},
		{"40,000 rules on a line", oneLine, ""},
		{"100 groups of 1,000", groups(100, 1000), ""},
		{"700 KB of brackets", strings.Repeat("[", 700<<10), "more than 64 levels of nesting at line 1, column 65"},
		{"100,000 rules", `{"acls": [` + strings.Repeat(`{"action":"accept","src":["*"],"dst":["*:*"]},`, 100_000) + `]}`, "policy is longer than 4194304 bytes"},
		{"100,000 short rules", `{"grants": [` + strings.Repeat(`{"src":["*"],"dst":["*"],"ip":["*"]},`, 100_000) + `]}`, "more than 400000 values"},
		{"sets of sets", ipsets(), "IP sets are too large"},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := time.Now()
		_, err := Parse([]byte(tt.text))
		took := time.Since(began)
		runtime.ReadMemStats(&after)
		t.Logf("%s: %v, %d MB", tt.name, took, (after.TotalAlloc-before.TotalAlloc)>>20)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			msg := fmt.Sprint(err)
			t.Errorf("%s: got %s, want %s", tt.name, msg[:min(len(msg), 300)], tt.want)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 256<<20 && !raceEnabled {
			t.Errorf("%s: allocated %d MB", tt.name, used>>20)
		}
	}
}

// groups is a policy with n groups of m users, all of which every rule names.
func groups(n, m int) string {
	var b bytes.Buffer
	b.WriteString(`{"groups": {`)
	var names strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `"group:g%d": [`, i)
		for j := range m {
			fmt.Fprintf(&b, `"user%d@x",`, j)
		}
		b.WriteString("],")
		fmt.Fprintf(&names, `"group:g%d",`, i)
	}
	b.WriteString(`}, "acls": [`)
	for range n {
		fmt.Fprintf(&b, `{"action":"accept","src":[%s],"dst":["*:*"]},`, names.String())
	}
	b.WriteString("]}")
	return b.String()
}

// ipsets is a file of sets that each have all the ones before, twice.
func ipsets() string {
	var b strings.Builder
	b.WriteString(`{"ipsets": {"ipset:s0": [`)
	for i := range 4000 {
		fmt.Fprintf(&b, `"10.%d.%d.1",`, i/200, i%200)
	}
	b.WriteString("],")
	for i := range 12 {
		fmt.Fprintf(&b, `"ipset:s%d": [`, i+1)
		for range 100 {
			fmt.Fprintf(&b, `"remove ipset:s%d", "add ipset:s%d",`, i, i)
		}
		b.WriteString("],")
	}
	b.WriteString("}}")
	return b.String()
}

// A policy that is accepted compiles in bounded time and memory, and so do its
// filters, tests and comparisons, however it explodes.
func TestHostilePolicies(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("takes seconds")
	}
	nodes := make([]Node, 5000)
	for i := range nodes {
		nodes[i] = Node{ID: wire.NodeID(i + 1), User: fmt.Sprintf("user%d@x", i), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)})}}
	}
	var prefixes, tests strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&prefixes, `"100.%d.%d.%d/%d",`, 64+i>>16, i>>8&255, i&255, 20+i%13)
	}
	for i := range 20_000 {
		fmt.Fprintf(&tests, `{"src":"autogroup:member","deny":["autogroup:member:%d"]},`, i+1)
	}
	for _, tt := range []struct{ name, text string }{
		{"40,000 equal rules", `{"acls": [` + strings.Repeat(`{"dst":["*:*"],"src":["*"],"action":"accept"},`, 35_000) + `]}`},
		{"groups in every rule", groups(100, 1000)},
		{"100,000 networks", `{"acls": [{"action":"accept","src":["*"],"dst":["100.64.0.1:1"]}], "grants": [{"src":[` + prefixes.String() + `],"dst":["*"],"ip":["22"]}]}`},
		{"20,000 tests", `{"acls": [{"action":"accept","src":["user1@x"],"dst":["user2@x:7"]}], "tests": [` + tests.String() + `]}`},
	} {
		p := mustParse(t, tt.text)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		var took []string
		step := func(name string, f func()) {
			began := time.Now()
			f()
			took = append(took, fmt.Sprintf("%s %v", name, time.Since(began).Round(time.Millisecond)))
		}
		var c *Compiled
		step("compile", func() { c = Compile(p, nodes) })
		step("filters", func() {
			for id := range wire.NodeID(5) {
				c.Filter(id + 1)
				c.Visible(id + 1)
			}
		})
		step("explain", func() { c.Explain(Endpoint{Node: 1}, Endpoint{Node: 2}, 6, 22) })
		step("test", func() { c.Test(nil) })
		step("diff", func() { Diff(nil, p, nodes) })
		step("join", func() { c.Upsert(Node{ID: 1, User: "other@x"}) })
		step("replace", func() { c.Replace(mustParse(t, `{"acls": []}`)) })
		runtime.ReadMemStats(&after)
		t.Logf("%s: %v %v, %d MB", tt.name, time.Since(start), took, (after.TotalAlloc-before.TotalAlloc)>>20)
		if used := after.TotalAlloc - before.TotalAlloc; used > 1<<30 {
			t.Errorf("%s: allocated %d MB", tt.name, used>>20)
		}
	}
}
