package portmap

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	gwAddr   = netip.MustParseAddr("192.168.1.1")
	selfAddr = netip.MustParseAddr("192.168.1.20")
	extAddr  = netip.MustParseAddr("203.0.113.7")
	location = "http://192.168.1.1:5000/root.xml"
)

const localPort = 41641

// mapping is an entry of a fake gateway's table.
type mapping struct {
	host     netip.Addr
	internal uint16
	lifetime time.Duration
	nonce    [12]byte
}

// fakeGateway is a network with a gateway on it that speaks what it is told
// to. It needs neither sockets nor real time.
type fakeGateway struct {
	t *testing.T

	mu       sync.Mutex // guards what follows
	gw, self netip.Addr
	pcp, pmp bool
	upnp     bool
	external netip.Addr
	booted   time.Time
	table    map[uint16]mapping // by external port
	lifetime time.Duration      // granted at most, 0 = what is asked for
	firstExt uint16             // != 0: external ports are given from here on
	refuse   map[Protocol]int   // with this code
	silent   bool
	location string            // of the UPnP description
	describe string            // the description, "" = a good one
	raw      func(nc net.Conn) // replaces HTTP
	forge    func(b []byte) []forged

	asked   []string // what arrived that means something
	packets int
	dials   []string
	open    int // sockets
}

// forged is a datagram from anywhere.
type forged struct {
	from netip.AddrPort
	data []byte
}

func newGateway(t *testing.T, speaks ...Protocol) *fakeGateway {
	g := &fakeGateway{
		t: t, gw: gwAddr, self: selfAddr, external: extAddr, booted: time.Now().Add(-time.Hour),
		table: make(map[uint16]mapping), refuse: make(map[Protocol]int), location: location,
	}
	for _, p := range speaks {
		switch p {
		case PCP:
			g.pcp = true
		case PMP:
			g.pmp = true
		case UPnP:
			g.upnp = true
		}
	}
	return g
}

func (g *fakeGateway) config() Config {
	return Config{
		LocalPort: func() uint16 { return localPort },
		ListenUDP: g.listen,
		DialTCP:   g.dial,
		Gateway: func() (netip.Addr, netip.Addr, bool) {
			g.mu.Lock()
			defer g.mu.Unlock()
			return g.gw, g.self, g.gw.IsValid()
		},
	}
}

// change does something to the gateway.
func (g *fakeGateway) change(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

// reboot makes it forget everything.
func (g *fakeGateway) reboot() {
	g.change(func() {
		g.booted = time.Now()
		clear(g.table)
	})
}

// mapped returns its table.
func (g *fakeGateway) mapped() map[uint16]mapping {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make(map[uint16]mapping)
	for k, v := range g.table {
		out[k] = v
	}
	return out
}

func (g *fakeGateway) took() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := g.asked
	g.asked = nil
	return out
}

func (g *fakeGateway) sockets() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open
}

// fakeSocket is a UDP socket on the fake network.
type fakeSocket struct {
	g      *fakeGateway
	addr   netip.AddrPort
	in     chan forged
	closed chan struct{}
	once   sync.Once

	mu       sync.Mutex // guards deadline
	deadline time.Time
}

func (g *fakeGateway) listen(_ context.Context, network, addr string) (net.PacketConn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if want := net.JoinHostPort(g.self.String(), "0"); addr != want {
		return nil, fmt.Errorf("listen at %s, want %s", addr, want)
	}
	g.open++
	return &fakeSocket{g: g, addr: netip.AddrPortFrom(g.self, 50000), in: make(chan forged, 64), closed: make(chan struct{})}, nil
}

func (s *fakeSocket) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case <-s.closed:
		return 0, net.ErrClosed
	default:
	}
	for _, r := range s.g.datagram(to.(*net.UDPAddr).AddrPort(), b) {
		select {
		case s.in <- r:
		default:
		}
	}
	return len(b), nil
}

func (s *fakeSocket) ReadFrom(b []byte) (int, net.Addr, error) {
	s.mu.Lock()
	late := time.NewTimer(time.Until(s.deadline))
	s.mu.Unlock()
	defer late.Stop()
	select {
	case r := <-s.in:
		return copy(b, r.data), net.UDPAddrFromAddrPort(r.from), nil
	case <-s.closed:
		return 0, nil, net.ErrClosed
	case <-late.C:
		return 0, nil, os.ErrDeadlineExceeded
	}
}

func (s *fakeSocket) Close() error {
	s.once.Do(func() {
		close(s.closed)
		s.g.change(func() { s.g.open-- })
	})
	return nil
}

func (s *fakeSocket) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	return nil
}

func (s *fakeSocket) LocalAddr() net.Addr              { return net.UDPAddrFromAddrPort(s.addr) }
func (s *fakeSocket) SetDeadline(time.Time) error      { return nil }
func (s *fakeSocket) SetWriteDeadline(time.Time) error { return nil }

// datagram answers a datagram.
func (g *fakeGateway) datagram(to netip.AddrPort, b []byte) (out []forged) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.packets++
	if g.forge != nil {
		out = g.forge(b)
	}
	if g.silent || to.Addr() != g.gw && to != ssdpGroup {
		return out
	}
	switch {
	case to.Port() == ssdpGroup.Port() && g.upnp && strings.Contains(string(b), ssdpTargets[0]):
		text := "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: " + ssdpTargets[0] + "\r\nEXT:\r\nLOCATION: " + g.location + "\r\n\r\n"
		out = append(out, forged{netip.AddrPortFrom(g.gw, 1900), []byte(text)})
	case to.Port() == gatewayPort && len(b) > 1 && b[0] == pcpVersion && g.pcp:
		out = append(out, forged{netip.AddrPortFrom(g.gw, gatewayPort), g.answerPCP(b)})
	case to.Port() == gatewayPort && len(b) > 1 && b[0] == pmpVersion && g.pmp:
		out = append(out, forged{netip.AddrPortFrom(g.gw, gatewayPort), g.answerPMP(b)})
	}
	return out
}

func (g *fakeGateway) epoch() uint32 { return uint32(time.Since(g.booted) / time.Second) }

// grant makes or ends a mapping; it returns what was given.
func (g *fakeGateway) grant(m mapping, suggest uint16) (external uint16, lifetime time.Duration, ok bool) {
	for ext, old := range g.table {
		if old.host == m.host && old.internal == m.internal {
			if old.nonce != m.nonce {
				return 0, 0, false
			}
			external = ext
		}
	}
	if m.lifetime == 0 {
		delete(g.table, external)
		return 0, 0, true
	}
	if external == 0 {
		if external = suggest; g.firstExt != 0 {
			external = g.firstExt
			g.firstExt++
		}
	}
	if g.lifetime != 0 && m.lifetime > g.lifetime {
		m.lifetime = g.lifetime
	}
	g.table[external] = m
	return external, m.lifetime, true
}

func (g *fakeGateway) answerPCP(b []byte) []byte {
	if len(b) < pcpHeaderLen || netip.AddrFrom16([16]byte(b[8:24])).Unmap() != g.self {
		g.t.Errorf("PCP request % x", b)
		return nil
	}
	out := make([]byte, pcpHeaderLen, 60)
	out[0], out[1] = pcpVersion, b[1]|pcpResponse
	binary.BigEndian.PutUint32(out[8:], g.epoch())
	if b[1] == pcpOpAnnounce {
		return out
	}
	body := append([]byte(nil), b[pcpHeaderLen:]...)
	life := time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Second
	m := mapping{g.self, binary.BigEndian.Uint16(body[16:]), life, [12]byte(body[:12])}
	g.asked = append(g.asked, fmt.Sprintf("PCP %d %v", m.internal, life))
	if code := g.refuse[PCP]; code != 0 {
		out[3] = byte(code)
		return append(out, body...)
	}
	ext, life, ok := g.grant(m, binary.BigEndian.Uint16(body[18:]))
	if !ok {
		out[3] = 2
		return append(out, body...)
	}
	binary.BigEndian.PutUint32(out[4:], uint32(life/time.Second))
	binary.BigEndian.PutUint16(body[18:], ext)
	a := g.external.As16()
	copy(body[20:], a[:])
	return append(out, body...)
}

func (g *fakeGateway) answerPMP(b []byte) []byte {
	out := []byte{pmpVersion, b[1] + pmpResponse, 0, byte(g.refuse[PMP])}
	out = binary.BigEndian.AppendUint32(out, g.epoch())
	if b[1] == pmpOpAddress {
		out[3] = 0
		a := g.external.As4()
		return append(out, a[:]...)
	}
	life := time.Duration(binary.BigEndian.Uint32(b[8:])) * time.Second
	m := mapping{host: g.self, internal: binary.BigEndian.Uint16(b[4:]), lifetime: life}
	g.asked = append(g.asked, fmt.Sprintf("NAT-PMP %d %v", m.internal, life))
	if out[3] != 0 {
		return out
	}
	ext, life, _ := g.grant(m, binary.BigEndian.Uint16(b[6:]))
	out = append(out, b[4:6]...)
	out = binary.BigEndian.AppendUint16(out, ext)
	return binary.BigEndian.AppendUint32(out, uint32(life/time.Second))
}

const goodDescription = `<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>
<device><deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><friendlyName>Test</friendlyName>
<serviceList><service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType><controlURL>/ctl/L3F</controlURL></service></serviceList>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType>
<serviceList><service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<controlURL>/ctl/IPConn</controlURL><eventSubURL>/evt/IPConn</eventSubURL></service></serviceList></device></deviceList></device></deviceList></device></root>`

func (g *fakeGateway) dial(_ context.Context, _, addr string) (net.Conn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dials = append(g.dials, addr)
	if !g.upnp || g.silent || addr != netip.AddrPortFrom(g.gw, 5000).String() {
		return nil, fmt.Errorf("dial %s: refused", addr)
	}
	ours, theirs := net.Pipe()
	raw := g.raw
	go func() {
		defer theirs.Close()
		if raw != nil {
			raw(theirs)
			return
		}
		req, err := http.ReadRequest(bufio.NewReader(theirs))
		if err != nil {
			return
		}
		body, _ := io.ReadAll(req.Body)
		status, text := g.answerHTTP(req, body)
		fmt.Fprintf(theirs, "HTTP/1.1 %d x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(text), text)
	}()
	return ours, nil
}

func (g *fakeGateway) answerHTTP(req *http.Request, body []byte) (int, string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if req.Method == http.MethodGet && req.URL.Path == "/root.xml" {
		if g.describe != "" {
			return 200, g.describe
		}
		return 200, goodDescription
	}
	_, action, _ := strings.Cut(strings.Trim(req.Header.Get("SOAPAction"), `"`), "#")
	if req.URL.Path != "/ctl/IPConn" || action == "" {
		return 404, ""
	}
	var e struct {
		Body struct {
			Inner struct {
				Port     uint16 `xml:"NewExternalPort"`
				Internal uint16 `xml:"NewInternalPort"`
				Client   string `xml:"NewInternalClient"`
				Proto    string `xml:"NewProtocol"`
				Lease    string `xml:"NewLeaseDuration"`
			} `xml:",any"`
		}
	}
	if err := xml.Unmarshal(body, &e); err != nil {
		g.t.Errorf("SOAP: %v in %q", err, body)
	}
	in := e.Body.Inner
	fault := func(code int) (int, string) {
		return 500, fmt.Sprintf(`<s:Envelope xmlns:s="x"><s:Body><s:Fault><faultcode>s:Client</faultcode><detail><UPnPError xmlns="y"><errorCode>%d</errorCode><errorDescription>no</errorDescription></UPnPError></detail></s:Fault></s:Body></s:Envelope>`, code)
	}
	done := func(inner string) (int, string) {
		return 200, fmt.Sprintf(`<s:Envelope xmlns:s="x"><s:Body><u:%sResponse xmlns:u="y">%s</u:%sResponse></s:Body></s:Envelope>`, action, inner, action)
	}
	switch action {
	case "GetExternalIPAddress":
		return done("<NewExternalIPAddress>" + g.external.String() + "</NewExternalIPAddress>")
	case "AddPortMapping":
		secs, _ := strconv.Atoi(in.Lease)
		life := time.Duration(secs) * time.Second
		g.asked = append(g.asked, fmt.Sprintf("UPnP %d %v", in.Internal, life))
		if code := g.refuse[UPnP]; code == upnpOnlyPermanent && life != 0 || code != 0 && code != upnpOnlyPermanent {
			return fault(code)
		}
		if in.Proto != "UDP" || in.Client != g.self.String() {
			return fault(402)
		}
		if old, ok := g.table[in.Port]; ok && old.host != g.self {
			return fault(upnpConflict)
		}
		g.table[in.Port] = mapping{host: g.self, internal: in.Internal, lifetime: life}
		return done("")
	case "DeletePortMapping":
		g.asked = append(g.asked, fmt.Sprintf("UPnP delete %d", in.Port))
		delete(g.table, in.Port)
		return done("")
	}
	return fault(401)
}
