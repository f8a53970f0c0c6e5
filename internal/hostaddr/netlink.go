package hostaddr

import "encoding/binary"

// The parts of Linux's rtnetlink protocol that tell of changes. See rtnetlink(7).
const (
	nlHeaderLen = 16
	nlError     = 2
	rtmNewLink  = 16
	rtmDelLink  = 17
	rtmNewAddr  = 20
	rtmDelAddr  = 21
	rtmNewRoute = 24
	rtmDelRoute = 25

	routeHeaderLen = 12
	mainTable      = 254
	rtaOif         = 4
	rtaGateway     = 5
	rtaPriority    = 6
	rtaMultipath   = 9
	rtaTable       = 15

	maxRoutes = 64 // default routes remembered
)

// netlinkParser reads what the kernel tells. It remembers the default routes, as
// news of one that is there already is none.
type netlinkParser struct {
	routes map[string]bool
}

// parse returns what the messages of one datagram say. Malformed ones are
// skipped.
func (p *netlinkParser) parse(b []byte) (c Change) {
	for len(b) >= nlHeaderLen {
		n := int(binary.NativeEndian.Uint32(b))
		if n < nlHeaderLen || n > len(b) {
			return c
		}
		kind, body := binary.NativeEndian.Uint16(b[4:]), b[nlHeaderLen:n]
		switch kind {
		case rtmNewLink, rtmDelLink, rtmNewAddr, rtmDelAddr:
			c.Addresses = true
		case rtmNewRoute, rtmDelRoute:
			if key, ok := defaultRoute(body); ok && p.note(key, kind == rtmNewRoute) {
				c.Route = true
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return c
}

// note reports whether that a route is there, or is not, is news.
func (p *netlinkParser) note(key string, there bool) bool {
	if there && p.routes[key] {
		return false
	}
	if !there {
		delete(p.routes, key)
		return true
	}
	if p.routes == nil || len(p.routes) >= maxRoutes {
		p.routes = make(map[string]bool)
	}
	p.routes[key] = true
	return true
}

// defaultRoute returns what tells a route from others if it is a default route
// of the main table.
func defaultRoute(b []byte) (key string, ok bool) {
	if len(b) < routeHeaderLen || b[1] != 0 {
		return "", false
	}
	table, id := uint32(b[4]), append([]byte(nil), b[0])
	for b = b[routeHeaderLen:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return "", false
		}
		switch kind := binary.NativeEndian.Uint16(b[2:]); kind {
		case rtaTable:
			if n >= 8 {
				table = binary.NativeEndian.Uint32(b[4:])
			}
		case rtaOif, rtaGateway, rtaPriority, rtaMultipath:
			id = append(append(id, byte(kind)), b[4:n]...)
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return string(id), table == mainTable
}
