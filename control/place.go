package control

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// maxPlaces bounds how many URLs a control server may have.
const maxPlaces = 16

// place is one of the URLs that a control server is reached at.
type place struct {
	url  *url.URL
	base string // without trailing slash
	host string // authority
	addr string // host:port to dial
}

// parsePlaces reads one URL, or several with commas between them.
func parsePlaces(list string) (places []place, err error) {
	for _, text := range strings.Split(list, ",") {
		u, err := parseURL(strings.TrimSpace(text))
		if err != nil {
			return nil, err
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		places = append(places, place{u, strings.TrimRight(u.String(), "/"), u.Host, net.JoinHostPort(u.Hostname(), port)})
	}
	if len(places) > maxPlaces {
		return nil, errors.New("control URL: more than 16 in the list")
	}
	return places, nil
}

// local reports whether the place is on this host.
func (p *place) local() bool {
	if p.url.Hostname() == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(p.url.Hostname())
	return err == nil && ip.Unmap().IsLoopback()
}

// here is the place that is used now: the client stays until it fails. Nodes
// begin anywhere in the list, so that they spread over all.
func (c *Client) here() *place { return c.at.Load() }

// move goes on to another place. Only the holder of the token in c.dialing calls
// it.
func (c *Client) move() {
	c.turn = (c.turn + 1) % len(c.places)
	c.at.Store(&c.places[c.turn])
}

func (c *Client) start() {
	c.turn = rand.IntN(len(c.places))
	c.at.Store(&c.places[c.turn])
}
