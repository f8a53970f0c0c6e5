package server

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"mesh/control/wire"
)

// Bounds on what is kept of a node's report.
const (
	maxEndpoints = 64
	maxServices  = 64
	maxRoutes    = 64
	maxText      = 128 // bytes of any text
)

// cleanHostinfo returns what is kept of h: known members, bounded. The network
// report is kept elsewhere.
func cleanHostinfo(h *wire.Hostinfo) *wire.Hostinfo {
	if h == nil {
		return &wire.Hostinfo{}
	}
	c := &wire.Hostinfo{
		IPNVersion: clip(h.IPNVersion), OS: clip(h.OS), OSVersion: clip(h.OSVersion), Hostname: clip(h.Hostname),
		GoArch: clip(h.GoArch), GoVersion: clip(h.GoVersion), Package: clip(h.Package), App: clip(h.App),
		ShieldsUp: h.ShieldsUp, Userspace: h.Userspace,
	}
	for _, s := range h.Services[:min(len(h.Services), maxServices)] {
		c.Services = append(c.Services, wire.Service{Proto: clip(s.Proto), Port: s.Port, Description: clip(s.Description)})
	}
	for _, r := range h.RoutableIPs {
		if p, err := netip.ParsePrefix(r); err == nil && p == p.Masked() && len(c.RoutableIPs) < maxRoutes {
			c.RoutableIPs = append(c.RoutableIPs, p.String())
		}
	}
	return c
}

// peerHostinfo is what peers get to see of a clean Hostinfo.
func peerHostinfo(h *wire.Hostinfo) *wire.Hostinfo {
	if h == nil {
		return &wire.Hostinfo{}
	}
	return &wire.Hostinfo{Hostname: h.Hostname, OS: h.OS, ShieldsUp: h.ShieldsUp, Services: h.Services}
}

// clip shortens a text and makes it valid UTF-8 without control characters.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
		for len(s) > 0 && !utf8.ValidString(s) && len(s) > maxText-utf8.UTFMax {
			s = s[:len(s)-1]
		}
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			return -1
		}
		return r
	}, s)
}

// cleanEndpoints drops what no peer could or should send to, and doubles.
func cleanEndpoints(in []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, e := range in {
		a := e.Addr()
		switch {
		case len(out) == maxEndpoints:
			return out
		case !e.IsValid(), e.Port() == 0, a.Zone() != "", a.IsUnspecified(), a.IsMulticast(), a.IsLinkLocalUnicast(),
			a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			continue
		}
		e = netip.AddrPortFrom(a.Unmap(), e.Port())
		if !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out
}

// maxLabel is the longest DNS label.
const maxLabel = 63

// label turns a host name into a DNS label: "Bob's Laptop.local" becomes
// "bobs-laptop".
func label(hostname string) string {
	h := strings.ToLower(hostname)
	h = strings.TrimSuffix(h, ".")
	for _, suffix := range []string{".localdomain", ".local", ".lan"} {
		h = strings.TrimSuffix(h, suffix)
	}
	var b strings.Builder
	dash := true // no dash at the start, none twice
	for _, r := range h {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteRune(r)
			dash = false
		case r == '\'':
		case !dash:
			b.WriteByte('-')
			dash = true
		}
		if b.Len() == maxLabel {
			break
		}
	}
	if h = strings.Trim(b.String(), "-"); h == "" {
		return "node"
	}
	return h
}

// suffixed returns base with "-i" behind it, within the length of a label.
func suffixed(base string, i int) string {
	end := "-" + strconv.Itoa(i)
	if len(base)+len(end) > maxLabel {
		base = strings.TrimRight(base[:maxLabel-len(end)], "-")
	}
	return base + end
}
