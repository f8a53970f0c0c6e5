package server

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// Places bounds how many there may be of something that strangers can make, in
// all and for each source address (of IPv6 the /64), so that one of them does
// not keep the others out. It holds nothing of those who have left.
type Places struct {
	max, perSource int

	mu      sync.Mutex // guards the members below
	taken   int
	sources map[netip.Prefix]int
}

// NewPlaces returns as many places as max says, and of these perSource for one
// source.
func NewPlaces(max, perSource int) *Places {
	return &Places{max: max, perSource: perSource, sources: make(map[netip.Prefix]int)}
}

// Enter takes a place for somebody at addr. If ok, leave gives it back; it may be
// called more than once.
func (p *Places) Enter(addr net.Addr) (leave func(), ok bool) {
	var from netip.Addr
	if addr != nil {
		from = addrOf(addr.String())
	}
	return p.enter(from)
}

func (p *Places) enter(from netip.Addr) (leave func(), ok bool) {
	src := source(from)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.max || p.sources[src] >= p.perSource {
		return nil, false
	}
	p.taken++
	p.sources[src]++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.taken--
		count(p.sources, src, -1)
	}), true
}

// Taken is how many places are.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// addrOf reads the address of "ADDR:PORT"; invalid for anything else.
func addrOf(s string) netip.Addr {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}

// Most connections of an HTTPServer that are not upgraded, in all and of one
// source.
const (
	maxPlainConns       = 8192
	maxPlainConnsSource = 2048
)

// boundConns has srv close connections that are too many. Those that were
// upgraded do not count: they have bounds of their own.
func boundConns(srv *http.Server, places *Places) {
	var mu sync.Mutex // guards inside
	inside := make(map[net.Conn]func())
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			leave, ok := places.Enter(c.RemoteAddr())
			if !ok {
				c.Close()
				return
			}
			mu.Lock()
			inside[c] = leave
			mu.Unlock()
		case http.StateHijacked, http.StateClosed:
			mu.Lock()
			leave := inside[c]
			delete(inside, c)
			mu.Unlock()
			if leave != nil {
				leave()
			}
		}
	}
}
