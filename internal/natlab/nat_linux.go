package natlab

import (
	"net/netip"
	"strings"
)

// Kind is how a router translates and filters. The words are those of RFC 4787:
// endpoint-independent (EI), address-dependent (AD), address- and
// port-dependent (APD), for mapping and for filtering.
type Kind string

// Kinds of routers.
const (
	Home           Kind = "masq-drop"        // EI mapping, APD filtering, nothing let in: what homes have
	Bare           Kind = "masq-bare"        // as Home, without a filter on the router itself
	Symmetric      Kind = "symmetric"        // APD mapping, APD filtering
	FullyRandom    Kind = "symmetric-fully"  // as Symmetric, with another way to choose ports
	FullCone       Kind = "full-cone"        // EI mapping, EI filtering
	AddrRestricted Kind = "addr-restricted"  // EI mapping, AD filtering
	PortRestricted Kind = "port-restricted"  // EI mapping by a table, APD filtering
	UDPBlocked     Kind = "udp-blocked"      // only TCP passes
	Hairpin        Kind = "hairpin"          // EI mapping, EI filtering, hosts inside reach each other by the outer address
	HairpinCGN     Kind = "hairpin-cgn"      // as Hairpin, with APD filtering
	Mapped         Kind = "symmetric-mapped" // as Symmetric, ready for a daemon that maps ports: see Router.MapPorts
	Corporate      Kind = "corporate"        // only TCP to ports 80 and 443, and DNS
)

// Both parts of the filter of an ordinary router: nothing comes in that was not
// asked for, neither to the router nor to those behind it.
const (
	dropInput   = `chain input { type filter hook input priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`
	dropForward = `chain forward { type filter hook forward priority 0; iifname "wan" ct state established,related accept; iifname "wan" drop; }`
)

// mapped is endpoint-independent mapping by a table of the ports in use. It is
// keyed by the inner port: two hosts behind it must not use the same one.
const mapped = `
table ip nat {
	map fc { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 300s; size 65535; }
	chain pre {
		type nat hook prerouting priority dstnat;
		PRE meta l4proto udp dnat ip to udp dport map @fc;
	}
	chain post {
		type nat hook postrouting priority srcnat;
		HAIRPIN
		oifname "wan" meta l4proto udp update @fc { udp sport timeout 300s : ip saddr . udp sport }
		oifname "wan" snat to $WAN;
	}
}
`

// forDaemon are the rules of a router with the chains that miniupnpd fills.
const forDaemon = `
table inet filter {
	chain miniupnpd { }
	chain prerouting_miniupnpd { }
	chain postrouting_miniupnpd { }
	chain input {
		type filter hook input priority 0;
		iifname "wan" ct state established,related accept;
		iifname "wan" drop;
	}
	chain forward {
		type filter hook forward priority 0; policy drop;
		iifname "lan" accept;
		ct state established,related accept;
		jump miniupnpd;
	}
	chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
	chain postrouting {
		type nat hook postrouting priority 100;
		jump postrouting_miniupnpd;
		oifname "wan" masquerade random;
	}
}
`

func masquerade(how string) string {
	return `table ip nat { chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade ` + how + `; }; }`
}

func filter(chains ...string) string {
	return "\ntable ip filter {\n" + strings.Join(chains, "\n") + "\n}\n"
}

// rules are the kind's nftables rules for a router with that outer address.
func (k Kind) rules(wan netip.Addr) string {
	plain := strings.NewReplacer("PRE", `iifname "wan"`, "HAIRPIN", "").Replace(mapped)
	hairpin := strings.NewReplacer("PRE", "ip daddr $WAN",
		"HAIRPIN", `ct status dnat oifname "lan" iifname "lan" meta l4proto udp snat to $WAN;`).Replace(mapped)
	var rules string
	switch k {
	case Home:
		rules = masquerade("") + filter(dropInput, dropForward)
	case Bare:
		rules = masquerade("")
	case Symmetric:
		rules = masquerade("random") + filter(dropInput, dropForward)
	case FullyRandom:
		rules = masquerade("fully-random") + filter(dropInput, dropForward)
	case FullCone:
		rules = plain
	case Hairpin:
		rules = hairpin
	case HairpinCGN:
		rules = hairpin + filter(`chain forward { type filter hook forward priority 0;
			iifname "lan" accept; iifname "wan" ct state established,related accept; iifname "wan" drop; }`)
	case AddrRestricted:
		rules = plain + filter(`set seen { type ipv4_addr . inet_service . ipv4_addr; flags dynamic,timeout; timeout 300s; size 65535; }
			chain forward { type filter hook forward priority 0;
				oifname "wan" meta l4proto udp update @seen { ip saddr . udp sport . ip daddr timeout 300s };
				iifname "wan" meta l4proto udp ip daddr . udp dport . ip saddr @seen accept;
				iifname "wan" ct state established,related accept;
				iifname "wan" drop; }`)
	case PortRestricted:
		rules = plain + filter(dropForward)
	case UDPBlocked:
		rules = masquerade("") + filter(dropInput, `chain forward { type filter hook forward priority 0;
			meta l4proto udp drop; iifname "wan" ct state established,related accept; iifname "wan" drop; }`)
	case Mapped:
		rules = forDaemon
	case Corporate:
		rules = masquerade("") + filter(dropInput, `chain forward { type filter hook forward priority 0;
			ct state established,related accept; tcp dport { 80, 443 } accept; udp dport 53 accept; drop; }`)
	default:
		panic("natlab: no rules for " + string(k))
	}
	return strings.ReplaceAll(rules, "$WAN", wan.String())
}
