package iprange

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want string // ranges, or the error
	}{
		{"*", "0.0.0.0-255.255.255.255 ::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
		{"100.64.0.1", "100.64.0.1-100.64.0.1"},
		{"fd7a::1", "fd7a::1-fd7a::1"},
		{"100.64.0.0/24", "100.64.0.0-100.64.0.255"},
		{"fd7a::/126", "fd7a::-fd7a::3"},
		{"0.0.0.0/0", "0.0.0.0-255.255.255.255"},
		{"100.64.0.5-100.64.0.9", "100.64.0.5-100.64.0.9"},
		{"fd7a::5-fd7a::9", "fd7a::5-fd7a::9"},
		{"100.64.9.1/24", `"100.64.9.1/24" has bits set behind its prefix`},
		{"100.64.0.0/33", `"100.64.0.0/33" is not a network`},
		{"100.64.0.9-100.64.0.5", `"100.64.0.9-100.64.0.5" is not a range`},
		{"100.64.0.1-fd7a::1", `"100.64.0.1-fd7a::1" is not a range`},
		{"1-2-3", `"1" is not an address`},
		{"100.64.0.1-", `"" is not an address`},
		{"fe80::1%eth0", `"fe80::1%eth0" has a zone`},
		{"::ffff:100.64.0.2", `"::ffff:100.64.0.2" is an IPv4-mapped address`},
		{"::ffff:100.64.0.0/120", `"::ffff:100.64.0.0/120" is an IPv4-mapped address`},
		{"", `"" is not an address`},
		{"cap:x", `"cap:x" is not an address`},
		{strings.Repeat("x", 100), `"` + strings.Repeat("x", 64) + `…" is not an address`},
	} {
		got, err := Parse(tt.in)
		var text []string
		for _, r := range got {
			text = append(text, r.First.String()+"-"+r.Last.String())
		}
		s := strings.Join(text, " ")
		if err != nil {
			s = err.Error()
		}
		if s != tt.want {
			t.Errorf("%q: %s, want %s", tt.in, s, tt.want)
		}
	}
}

func TestString(t *testing.T) {
	for in, want := range map[string]string{
		"100.64.0.1":              "100.64.0.1",
		"fd7a::1/128":             "fd7a::1",
		"10.0.0.0-10.0.0.255":     "10.0.0.0/24",
		"0.0.0.0-255.255.255.255": "0.0.0.0/0",
		"10.0.0.1-10.0.0.255":     "10.0.0.1-10.0.0.255",
		"fd7a::5-fd7a::9":         "fd7a::5-fd7a::9",
	} {
		r, err := Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := r[0].String(); got != want {
			t.Errorf("%s is written as %s, want %s", in, got, want)
		}
	}
}

func TestPrefixes(t *testing.T) {
	for _, tt := range []struct{ r, want string }{
		{"100.64.0.0-100.115.91.255", "100.64.0.0/11 100.96.0.0/12 100.112.0.0/15 100.114.0.0/16 100.115.0.0/18 100.115.64.0/20 100.115.80.0/21 100.115.88.0/22"},
		{"0.0.0.0-255.255.255.255", "0.0.0.0/0"},
		{"::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::/0"},
		{"10.0.0.1-10.0.0.1", "10.0.0.1/32"},
		{"10.0.0.1-10.0.0.6", "10.0.0.1/32 10.0.0.2/31 10.0.0.4/31 10.0.0.6/32"},
	} {
		a, err := Parse(tt.r)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range a[0].Prefixes() {
			got = append(got, p.String())
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %v", tt.r, got)
		}
	}
	worst, _ := Parse("::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe")
	if n := len(worst[0].Prefixes()); n != 254 {
		t.Errorf("widest range: %d prefixes", n)
	}
}

func TestContainsAndOverlaps(t *testing.T) {
	parse := func(s string) Range {
		r, err := Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return r[0]
	}
	r := parse("100.64.0.5-100.64.0.9")
	for a, want := range map[string]bool{"100.64.0.4": false, "100.64.0.5": true, "100.64.0.9": true, "100.64.0.10": false, "fd7a::1": false, "::ffff:100.64.0.5": false} {
		if r.Contains(netip.MustParseAddr(a)) != want {
			t.Errorf("contains %s: %v", a, !want)
		}
	}
	for o, want := range map[string]bool{"100.64.0.1-100.64.0.4": false, "100.64.0.1-100.64.0.5": true, "100.64.0.9": true, "100.64.0.10": false, "0.0.0.0/0": true, "::/0": false} {
		if r.Overlaps(parse(o)) != want || parse(o).Overlaps(r) != want {
			t.Errorf("overlaps %s: %v", o, !want)
		}
	}
	if (Range{}).Contains(netip.MustParseAddr("0.0.0.0")) {
		t.Error("the zero range holds something")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"*", "100.64.0.0/10", "fd7a::1-fd7a::9", "1.2.3.4", "::ffff:1.2.3.4/99", "fe80::1%x-fe80::2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rs, err := Parse(s)
		if err != nil {
			return
		}
		for _, r := range rs {
			if !r.Contains(r.First) || !r.Contains(r.Last) || r.First.Is4In6() || r.First.Zone() != "" {
				t.Fatalf("%q: %v", s, r)
			}
			ps := r.Prefixes()
			if ps[0].Addr() != r.First || Of(ps[len(ps)-1]).Last != r.Last {
				t.Fatalf("%q: %v", s, ps)
			}
		}
	})
}
