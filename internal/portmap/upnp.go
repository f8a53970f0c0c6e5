package portmap

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// UPnP IGD: the gateway is found by SSDP, describes itself in an XML document
// and takes orders as SOAP over HTTP. See the UPnP Device Architecture and the
// services WANIPConnection:1 and :2.

// ssdpGroup is where searches go.
var ssdpGroup = netip.MustParseAddrPort("239.255.255.250:1900")

// ssdpTargets are what is searched for. A device of version 2 should answer
// for version 1, too; some do not.
var ssdpTargets = []string{
	"urn:schemas-upnp-org:device:InternetGatewayDevice:1",
	"urn:schemas-upnp-org:device:InternetGatewayDevice:2",
}

// wanServices are the services that map ports, the best first.
var wanServices = []string{
	"urn:schemas-upnp-org:service:WANIPConnection:2",
	"urn:schemas-upnp-org:service:WANIPConnection:1",
	"urn:schemas-upnp-org:service:WANPPPConnection:1",
}

// Error codes of the services.
const (
	upnpConflict      = 718 // the external port is taken by another host
	upnpSamePort      = 724 // external and internal port must be the same
	upnpOnlyPermanent = 725 // no leases
)

const (
	maxURL          = 1024
	maxXMLTokens    = 20000
	maxServices     = 64
	maxValue        = 256 // longest text of an element that is kept
	maxValues       = 64
	maxPortAttempts = 4
	description     = "mesh"
)

// endpoint is a URL on the gateway.
type endpoint struct {
	addr netip.AddrPort
	path string // with query
}

func (e endpoint) String() string { return "http://" + e.addr.String() + e.path }

// service is a service that maps ports.
type service struct {
	kind    string // one of wanServices
	control endpoint
}

// gatewayURL reads a URL, relative to base if that is not nil, and accepts it
// only if it leads to the gateway itself by its address: nobody on the local
// network may have us send requests elsewhere.
func gatewayURL(text string, base *endpoint, gw netip.Addr) (endpoint, error) {
	text = strings.TrimSpace(text)
	if text == "" || len(text) > maxURL {
		return endpoint{}, errors.New("a URL is missing or too long")
	}
	u, err := url.Parse(text)
	if err != nil {
		return endpoint{}, errors.New("a URL cannot be read")
	}
	if base != nil {
		b, err := url.Parse(base.String())
		if err != nil {
			return endpoint{}, errors.New("a base URL cannot be read")
		}
		u = b.ResolveReference(u)
	}
	if u.Scheme != "http" || u.User != nil || u.Opaque != "" {
		return endpoint{}, errors.New("a URL is not plain http")
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil || addr.Unmap() != gw {
		return endpoint{}, errors.New("a URL leads away from the gateway")
	}
	port := uint64(80)
	if u.Port() != "" {
		port, err = strconv.ParseUint(u.Port(), 10, 16)
	}
	if err != nil || port == 0 {
		return endpoint{}, errors.New("a URL has a bad port")
	}
	e := endpoint{netip.AddrPortFrom(gw, uint16(port)), u.RequestURI()}
	if len(e.path) > maxURL || strings.ContainsFunc(e.path, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return endpoint{}, errors.New("a URL has a bad path")
	}
	return e, nil
}

// ssdpSearch is the question for a kind of device.
func ssdpSearch(target string) []byte {
	return []byte("M-SEARCH * HTTP/1.1\r\nHOST: " + ssdpGroup.String() +
		"\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: " + target + "\r\n\r\n")
}

// parseSSDP reads the answer of a gateway: where its description is.
func parseSSDP(b []byte, gw netip.Addr) (at endpoint, ok bool) {
	// Some leave out the empty line at the end.
	b = append(bytes.TrimRight(slices.Clone(b), "\r\n"), "\r\n\r\n"...)
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
	if err != nil {
		return at, false
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !slices.Contains(ssdpTargets, resp.Header.Get("St")) {
		return at, false
	}
	at, err = gatewayURL(resp.Header.Get("Location"), nil, gw)
	return at, err == nil
}

// decoder reads XML token by token, so that its depth costs nothing.
func decoder(b []byte) *xml.Decoder {
	d := xml.NewDecoder(bytes.NewReader(b))
	// What matters is ASCII in whatever encoding the document claims.
	d.CharsetReader = func(_ string, r io.Reader) (io.Reader, error) { return r, nil }
	return d
}

// elements calls leaf for the text of each element without children, and end
// for the end of each element, with local names.
func elements(b []byte, leaf func(name, text string), end func(name string)) error {
	d := decoder(b)
	var text []byte
	open := false // the last tag was a start
	for range maxXMLTokens {
		t, err := d.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read XML: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			open, text = true, text[:0]
		case xml.CharData:
			if open && len(text)+len(t) <= maxURL {
				text = append(text, t...)
			}
		case xml.EndElement:
			if open {
				leaf(t.Name.Local, strings.TrimSpace(string(text)))
			}
			open = false
			end(t.Name.Local)
		}
	}
	return errors.New("read XML: document too long")
}

// parseDescription returns the services of a device, wherever in its tree,
// that can map ports: the best first.
func parseDescription(b []byte, at endpoint) ([]service, error) {
	base := at
	var found []service
	var kind, control string
	seen := 0
	err := elements(b, func(name, text string) {
		switch name {
		case "URLBase": // of version 1.0; where it lies elsewhere, the document's own address counts
			if e, err := gatewayURL(text, nil, at.addr.Addr()); err == nil {
				base = e
			}
		case "serviceType":
			kind = text
		case "controlURL":
			control = text
		}
	}, func(name string) {
		if name != "service" {
			return
		}
		if seen++; seen <= maxServices && slices.Contains(wanServices, kind) {
			if e, err := gatewayURL(control, &base, at.addr.Addr()); err == nil {
				found = append(found, service{kind, e})
			}
		}
		kind, control = "", ""
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b service) int {
		return slices.Index(wanServices, a.kind) - slices.Index(wanServices, b.kind)
	})
	return found, nil
}

// parseValues returns the texts of a SOAP answer by local name.
func parseValues(b []byte) (map[string]string, error) {
	values := make(map[string]string)
	err := elements(b, func(name, text string) {
		if _, ok := values[name]; !ok && len(values) < maxValues && len(name) <= maxValue && len(text) <= maxValue {
			values[name] = text
		}
	}, func(string) {})
	return values, err
}

// field is an argument of a SOAP action; some gateways care for the order.
type field struct{ name, value string }

func soapBody(kind, action string, args []field) []byte {
	var b bytes.Buffer
	b.WriteString(`<?xml version="1.0"?>` + "\r\n" +
		`<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>`)
	fmt.Fprintf(&b, `<u:%s xmlns:u="%s">`, action, kind)
	for _, a := range args {
		fmt.Fprintf(&b, "<%s>", a.name)
		xml.EscapeText(&b, []byte(a.value)) // writing to a buffer does not fail
		fmt.Fprintf(&b, "</%s>", a.name)
	}
	fmt.Fprintf(&b, "</u:%s></s:Body></s:Envelope>\r\n", action)
	return b.Bytes()
}

// call performs an action.
func (c *Client) call(ctx context.Context, s service, action string, args ...field) (map[string]string, error) {
	status, body, err := c.roundTrip(ctx, s.control, fmt.Sprintf("%s#%s", s.kind, action), soapBody(s.kind, action, args))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", action, err)
	}
	values, err := parseValues(body)
	if code, e := strconv.Atoi(values["errorCode"]); e == nil && err == nil && status != http.StatusOK {
		return nil, &refusal{UPnP, code, fmt.Sprintf("%s: %q", action, values["errorDescription"])}
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("%s: HTTP status %d", action, status)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", action, err)
	}
	return values, nil
}

// fetchServices reads a gateway's description.
func (c *Client) fetchServices(ctx context.Context, at endpoint) ([]service, error) {
	status, body, err := c.roundTrip(ctx, at, "", nil)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", at, err)
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("fetch %s: HTTP status %d", at, status)
	}
	list, err := parseDescription(body, at)
	if err != nil {
		return nil, fmt.Errorf("description at %s: %w", at, err)
	}
	return list, nil
}

// externalUPnP asks for the gateway's external address.
func (c *Client) externalUPnP(ctx context.Context, s service) (netip.Addr, error) {
	values, err := c.call(ctx, s, "GetExternalIPAddress")
	if err != nil {
		return netip.Addr{}, err
	}
	a, err := netip.ParseAddr(values["NewExternalIPAddress"])
	if err != nil || !a.Is4() || !sensible(netip.AddrPortFrom(a, 1)) {
		return netip.Addr{}, fmt.Errorf("the gateway says that its address is %q", values["NewExternalIPAddress"])
	}
	return a, nil
}

// mapUPnP asks for a mapping: to the port that is wanted, then to others.
func (c *Client) mapUPnP(ctx context.Context, l link, port, suggest uint16) (*lease, error) {
	s := c.recall(l).service
	if s.kind == "" {
		return nil, errNothing
	}
	addr, err := c.externalUPnP(ctx, s)
	if err != nil {
		return nil, err
	}
	external, lifetime := suggest, wantLifetime
	for range maxPortAttempts {
		err = c.addUPnP(ctx, l, s, port, external, lifetime)
		var no *refusal
		switch {
		case err == nil:
			return &lease{external: netip.AddrPortFrom(addr, external), lifetime: lifetime, service: s}, nil
		case !errors.As(err, &no):
			return nil, err
		case no.code == upnpOnlyPermanent && lifetime != 0:
			lifetime = 0
		case no.code == upnpSamePort && external != port:
			external = port
		case no.code == upnpConflict:
			external = 1024 + uint16(rand.N(65536-1024))
		default:
			return nil, err
		}
	}
	return nil, err
}

func (c *Client) addUPnP(ctx context.Context, l link, s service, internal, external uint16, lifetime time.Duration) error {
	_, err := c.call(ctx, s, "AddPortMapping",
		field{"NewRemoteHost", ""},
		field{"NewExternalPort", strconv.Itoa(int(external))},
		field{"NewProtocol", "UDP"},
		field{"NewInternalPort", strconv.Itoa(int(internal))},
		field{"NewInternalClient", l.self.String()},
		field{"NewEnabled", "1"},
		field{"NewPortMappingDescription", description},
		field{"NewLeaseDuration", strconv.Itoa(int(lifetime / time.Second))})
	return err
}

func (c *Client) releaseUPnP(ctx context.Context, le *lease) error {
	_, err := c.call(ctx, le.service, "DeletePortMapping",
		field{"NewRemoteHost", ""},
		field{"NewExternalPort", strconv.Itoa(int(le.external.Port()))},
		field{"NewProtocol", "UDP"})
	return err
}
