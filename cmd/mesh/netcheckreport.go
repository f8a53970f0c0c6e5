package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"mesh/internal/netcheck"
)

// writeReport prints a report on the network for people.
func writeReport(w io.Writer, r *netcheck.Report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, text string) { fmt.Fprintf(t, "%s\t%s\n", name, text) }
	line("udp", udpText(r))
	line("ipv4", familyText(r.IPv4))
	line("ipv6", familyText(r.IPv6))
	line("nat", natText(r))
	line("hairpin", hairpinText(r))
	line("port mapping", mappingText(r.PortMapping))
	line("captive portal", answer(r.CaptivePortal, "yes: somebody answers in the relays' name; log in to this network", "no", "not known: no relay offers the check"))
	line("home relay", homeText(r))
	if err := t.Flush(); err != nil {
		return err
	}
	if len(r.Regions) == 0 {
		return nil
	}
	https := false
	for _, g := range r.Regions {
		https = https || g.HTTPS != 0 || g.Error != ""
	}
	header := []string{"RELAY", "CODE", "NAME", "IPV4", "IPV6"}
	if https {
		header = append(header, "HTTPS")
	}
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(header, "\t"))
	for _, g := range r.Regions {
		cells := []string{fmt.Sprint(g.ID), plain(g.Code), plain(g.Name), latencyCell(g.V4), latencyCell(g.V6)}
		if https && g.Error != "" {
			cells = append(cells, plain(g.Error))
		} else if https {
			cells = append(cells, latencyCell(g.HTTPS))
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	return t.Flush()
}

func answer(b *bool, yes, no, unknown string) string {
	switch {
	case b == nil:
		return unknown
	case *b:
		return yes
	}
	return no
}

func udpText(r *netcheck.Report) string {
	blocked := "no answer, nor by HTTPS: the network or all relays are down"
	for _, g := range r.Regions {
		if g.HTTPS > 0 {
			blocked = "blocked: nodes are reached by relay only"
		}
	}
	return answer(r.UDP, "works", blocked, "not known: no relay could be asked")
}

func hairpinText(r *netcheck.Report) string {
	if r.NAT != nil && !*r.NAT {
		return "not needed without NAT"
	}
	return answer(r.Hairpin, "works", "does not work: hosts behind this NAT do not reach each other by its public address", "not known")
}

func familyText(f netcheck.Family) string {
	if f.Global.IsValid() {
		return "works, seen as " + f.Global.String()
	}
	if !f.Available && f.Works == nil {
		return "none: no interface has an address that leads anywhere"
	}
	return answer(f.Works, "works", "no answer by UDP", "not known: no relay has an address of it")
}

func natText(r *netcheck.Report) string {
	switch {
	case r.NAT == nil:
		return "not known"
	case !*r.NAT:
		return "none: others see this host's own address"
	}
	return "yes, " + answer(r.MappingVaries,
		"and it maps differently for each destination: direct paths are hard",
		"and it maps alike for all destinations: direct paths are easy",
		"of unknown kind: that takes the answers of two relays")
}

func mappingText(p *netcheck.PortMapping) string {
	switch {
	case p == nil:
		return "not asked"
	case p.Error != "":
		return "none: " + plain(p.Error)
	}
	var speaks []string
	for _, s := range []struct {
		ok   bool
		name string
	}{{p.PCP, "PCP"}, {p.PMP, "NAT-PMP"}, {p.UPnP, "UPnP"}} {
		if s.ok {
			speaks = append(speaks, s.name)
		}
	}
	if len(speaks) == 0 {
		return "none: the gateway speaks neither PCP nor NAT-PMP nor UPnP"
	}
	text := strings.Join(speaks, ", ")
	if p.External.IsValid() {
		text += ", external address " + p.External.String()
		if p.External.IsPrivate() {
			text += " (behind another NAT)"
		}
	}
	return text
}

func homeText(r *netcheck.Report) string {
	if r.Preferred == 0 {
		return "none: no relay answered"
	}
	for _, g := range r.Regions {
		if g.ID != r.Preferred {
			continue
		}
		text := fmt.Sprintf("%d", g.ID)
		if g.Name != "" || g.Code != "" {
			text += " " + plain(strings.TrimSpace(g.Name+" "+"("+g.Code+")"))
		}
		if l := g.Best(); l > 0 {
			return text + ", " + l.String()
		}
		return text + ", which does not answer now"
	}
	return fmt.Sprint(r.Preferred)
}

// latencyCell is a latency in a table.
func latencyCell(l netcheck.Latency) string {
	if l == 0 {
		return "-"
	}
	return l.String()
}
