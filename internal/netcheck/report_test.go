package netcheck

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"mesh/internal/stun"
)

func TestReportJSON(t *testing.T) {
	is := func(b bool) *bool { return &b }
	r := &Report{
		Time: time.Unix(1e9, 0).UTC(), Full: true, UDP: is(true), NAT: is(true), MappingVaries: is(false), Hairpin: is(false),
		IPv4:        Family{true, is(true), netip.MustParseAddrPort("203.0.113.7:41641")},
		PortMapping: &PortMapping{PCP: true, UPnP: true, External: netip.MustParseAddr("203.0.113.7")}, Preferred: 901,
		Regions: []Region{{ID: 901, Code: "lon", Name: "London", V4: Latency(12345 * time.Microsecond)}, {ID: 902, Code: "\x1b[31m"}},
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil || !reflect.DeepEqual(&back, r) {
		t.Errorf("%v: %s", err, text)
	}
	for _, part := range []string{`"udp":true`, `"ipv4Milliseconds":12.345`, `"global":"203.0.113.7:41641"`, `"preferredRelay":901`, `"natPMP":false`} {
		if !strings.Contains(string(text), part) {
			t.Errorf("no %s in %s", part, text)
		}
	}
	for _, bad := range []string{"-1", "1e300", `"x"`} {
		if err := json.Unmarshal([]byte(bad), new(Latency)); err == nil {
			t.Errorf("latency %s", bad)
		}
	}
}

// What comes to the sockets is from anybody.
func FuzzDatagram(f *testing.F) {
	tx := stun.TxID{1}
	server := netip.MustParseAddrPort("192.0.2.1:3478")
	f.Add(stun.AppendRequest(nil, tx))
	f.Add(stun.AppendResponse(nil, tx, netip.MustParseAddrPort("203.0.113.7:1")))
	f.Add(stun.AppendResponse(nil, tx, netip.MustParseAddrPort("[2001:db8::1]:1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &socket{}
		c := &check{news: make(chan struct{}, 1), pending: map[stun.TxID]asked{tx: {key: key{region: 1}, to: server, sock: s}},
			answers: map[key]answer{}, mapped: map[netip.AddrPort]netip.AddrPort{}, hairpin: map[stun.TxID]bool{}}
		c.take(s, netip.MustParseAddrPort("192.0.2.2:3478"), b)
		c.take(&socket{}, server, b)
		if len(c.answers) != 0 {
			t.Error("an answer from elsewhere was taken")
		}
		c.take(s, server, b)
		c.take(s, server, b)
		if len(c.mapped) > 1 || c.global4.IsValid() && !usable(c.global4) {
			t.Errorf("%v", c.mapped)
		}
	})
}
