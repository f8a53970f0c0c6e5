package main

import (
	"bytes"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh/internal/netcheck"
)

func TestWriteReport(t *testing.T) {
	is := func(b bool) *bool { return &b }
	r := &netcheck.Report{
		Time: time.Unix(1e9, 0).UTC(), Full: true, UDP: is(true), NAT: is(true), MappingVaries: is(false), Hairpin: is(false),
		IPv4:        netcheck.Family{Available: true, Works: is(true), Global: netip.MustParseAddrPort("203.0.113.7:41641")},
		PortMapping: &netcheck.PortMapping{PCP: true, UPnP: true, External: netip.MustParseAddr("203.0.113.7")}, Preferred: 901,
		Regions: []netcheck.Region{{ID: 901, Code: "lon", Name: "London", V4: netcheck.Latency(12345 * time.Microsecond)}, {ID: 902, Code: "\x1b[31m"}},
	}
	const want = `udp             works
ipv4            works, seen as 203.0.113.7:41641
ipv6            none: no interface has an address that leads anywhere
nat             yes, and it maps alike for all destinations: direct paths are easy
hairpin         does not work: hosts behind this NAT do not reach each other by its public address
port mapping    PCP, UPnP, external address 203.0.113.7
captive portal  not known: no relay offers the check
home relay      901 London (lon), 12.3 ms

RELAY  CODE   NAME    IPV4     IPV6
901    lon    London  12.3 ms  -
902    ?[31m  -       -        -
`
	var b bytes.Buffer
	if err := writeReport(&b, r); err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
	// The same network without UDP, and without a network.
	for _, test := range []struct {
		r    *netcheck.Report
		want []string
	}{
		{&netcheck.Report{UDP: is(false), IPv4: netcheck.Family{Available: true, Works: is(false)}, Regions: []netcheck.Region{{ID: 1, HTTPS: 1e7}}},
			[]string{"udp             blocked:", "ipv4            no answer by UDP\n", "NAME  IPV4  IPV6  HTTPS\n", "10.0 ms\n"}},
		{&netcheck.Report{UDP: is(false), Regions: []netcheck.Region{{ID: 1, Error: "refused"}}}, []string{"udp             no answer, nor by HTTPS", "none: no relay answered", "refused\n"}},
		{&netcheck.Report{NAT: is(false), CaptivePortal: is(true)}, []string{"hairpin         not needed", "nat             none", "captive portal  yes"}},
		{&netcheck.Report{Preferred: 7, Regions: []netcheck.Region{{ID: 7}}, PortMapping: &netcheck.PortMapping{}}, []string{"home relay      7, which does not answer now", "port mapping    none: the gateway speaks"}},
	} {
		var b bytes.Buffer
		writeReport(&b, test.r)
		for _, part := range test.want {
			if !strings.Contains(b.String(), part) {
				t.Errorf("no %q in\n%s", part, b.String())
			}
		}
	}
	if err := writeReport(failing{}, r); err == nil {
		t.Error("no error of the writer")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
