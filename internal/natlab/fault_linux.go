package natlab

import (
	"fmt"
	"net/netip"
)

// Cut drops everything that the router forwards, without a word to anybody,
// until Heal.
func (r *Router) Cut() {
	r.lab.t.Helper()
	r.Sh(`nft 'table ip cut { chain f { type filter hook forward priority -20; drop; }; }'`)
}

// CutUDP drops the UDP datagrams that the router forwards, until Heal.
func (r *Router) CutUDP() {
	r.lab.t.Helper()
	r.Sh(`nft 'table ip cut { chain f { type filter hook forward priority -20; meta l4proto udp drop; }; }'`)
}

// Lose drops a random part of what the router forwards, in percent, until Heal.
func (r *Router) Lose(percent int) {
	r.lab.t.Helper()
	r.Sh(fmt.Sprintf(`nft 'table ip cut { chain f { type filter hook forward priority -20; numgen random mod 1000 < %d drop; }; }'`, percent*10))
}

// Swallow drops UDP packets that are longer than a number of bytes, as a path
// with a broken discovery of its size does, until Heal. TCP, by which relays are
// reached, is spared: routers on such paths tell it to send less.
func (r *Router) Swallow(longer int) {
	r.lab.t.Helper()
	r.Sh(fmt.Sprintf(`nft 'table ip cut { chain f { type filter hook forward priority -20; meta l4proto udp meta length > %d drop; }; }'`, longer))
}

// Heal ends Cut, CutUDP, Lose and Swallow.
func (r *Router) Heal() {
	r.lab.t.Helper()
	r.Sh("nft delete table ip cut")
}

// Forget drops all translations: their next packets get others where the kind
// chooses anew.
func (r *Router) Forget() {
	r.lab.t.Helper()
	r.Sh("conntrack -F 2>/dev/null")
}

// Renumber gives a router on the internet another outer address.
func (r *Router) Renumber() {
	r.lab.t.Helper()
	r.lab.next++
	old := r.WAN
	r.WAN = netip.AddrFrom4([4]byte{203, 0, 113, byte(r.lab.next)})
	r.Sh(fmt.Sprintf(`
		ip addr del %s/24 dev wan
		ip addr add %s/24 dev wan
		conntrack -F 2>/dev/null
		nft flush ruleset
	`, old, r.WAN))
	r.Sh("nft -f - <<'RULES'\n" + r.Kind.rules(r.WAN) + "\nRULES")
	// What passed while there were no rules would go on untranslated.
	r.Sh("conntrack -F 2>/dev/null")
}

// Move takes the host to another router's network: its interface vanishes, and
// another one comes with another address.
func (h *Host) Move(to *Router) {
	h.lab.t.Helper()
	h.Sh("ip link del eth0")
	h.IPv4, h.router = to.join(h.NS, "eth0"), to
}

// Down takes the host's interface down, Up brings it back.
func (h *Host) Down() {
	h.lab.t.Helper()
	h.Sh("ip -o route show default > /tmp/route-" + h.NS + "; ip link set eth0 down")
}

// Up ends Down.
func (h *Host) Up() {
	h.lab.t.Helper()
	h.Sh("ip link set eth0 up; while read r; do ip route replace $r; done < /tmp/route-" + h.NS + "; rm /tmp/route-" + h.NS)
}
