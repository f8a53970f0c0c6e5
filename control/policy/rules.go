package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
)

// Members of access rules.
var (
	aclMembers   = []string{"action", "src", "dst", "proto", "srcPosture"}
	grantMembers = []string{"src", "dst", "ip", "app", "via", "srcPosture"}
)

// oldMembers are former names in "acls".
var oldMembers = map[string]string{"users": "src", "ports": "dst"}

// entry reads the members of one entry of "acls" or "grants", of which it must
// have those needed.
func (r *reader) entry(v hujson.Value, name string, known []string, needed ...string) (map[string]member, bool) {
	before := len(r.errs)
	if _, ok := v.Value.(*hujson.Object); !ok {
		r.fail(v.StartOffset, "", "%s must be an object", name)
		return nil, false
	}
	got := make(map[string]member)
	for _, m := range r.members(v, name) {
		if old, ok := oldMembers[m.name]; ok && slices.Contains(known, "action") {
			m.name = old
			if _, ok := got[old]; ok {
				r.fail(m.nameAt, "", "duplicate member %q", old)
			}
		}
		if !slices.Contains(known, m.name) {
			r.unknown(m, known)
			continue
		}
		got[m.name] = m
	}
	for _, n := range needed {
		if _, ok := got[n]; !ok && len(r.errs) == before {
			r.fail(v.StartOffset, "", "%s has no %q", name, n)
		}
	}
	if m, ok := got["srcPosture"]; ok && len(r.texts(m.value, "srcPosture")) > 0 {
		r.unsupported(m.nameAt, "%q: conditions on the state of devices, which a mesh does not know,", m.name)
	}
	return got, true
}

// texts reads an array of strings, with the place of each.
func (r *reader) texts(v hujson.Value, what string) (list []located) {
	for _, v := range r.array(v, what) {
		if s, ok := r.text(v, what); ok {
			list = append(list, located{s, v.StartOffset})
		}
	}
	return list
}

// located is a string with its place in the file.
type located struct {
	text string
	at   int
}

func (r *reader) readACL(i int, v hujson.Value) {
	name := fmt.Sprintf("acls[%d]", i)
	got, ok := r.entry(v, name, aclMembers, "action", "src", "dst")
	if !ok {
		return
	}
	a := access{}
	if m, ok := got["action"]; ok {
		if s, ok := r.text(m.value, "action"); ok && s != "accept" {
			r.fail(m.value.StartOffset, `everything is denied but what is accepted, so the only action is "accept"`, "action %q", s)
		}
	}
	hasPorts := true
	if m, ok := got["proto"]; ok {
		if s, ok := r.protoText(m.value); ok && s != "" {
			if a.protos, hasPorts, ok = parseProto(s); !ok {
				r.fail(m.value.StartOffset, "", "unknown protocol %q", s)
				hasPorts = true
			}
		}
	}
	if m, ok := got["src"]; ok {
		a.srcs = r.sources(m.value)
	}
	if m, ok := got["dst"]; ok {
		for _, t := range r.texts(m.value, "dst") {
			for _, d := range r.dests(t.text, t.at) {
				if d.sel.kind == kindSelf && !selfSources(a.srcs, true) {
					r.fail(t.at, "", "autogroup:self can only be used with users, groups, or supported autogroups")
				}
				if !hasPorts && slices.ContainsFunc(d.ports, func(p portRange) bool { return p != allPorts }) {
					r.fail(t.at, `write "*"`, "dst %q: the protocol has no ports", t.text)
				}
				a.dsts = append(a.dsts, d)
			}
		}
	}
	r.add(r.origin(name, v.StartOffset), a)
}

// protoText reads a protocol, which some write as a number.
func (r *reader) protoText(v hujson.Value) (string, bool) {
	if l, ok := v.Value.(hujson.Literal); ok && l.Kind() == '0' {
		return string(l), true
	}
	return r.text(v, "proto")
}

func (r *reader) sources(v hujson.Value) (list []*selector) {
	for _, t := range r.texts(v, "src") {
		if sels, ok := r.selectors(t.text, t.at, inSrc); ok {
			list = append(list, sels...)
		}
	}
	return list
}

// selfSources reports whether every source is made of users, without whom there
// is no self. "acls" let "*" stand for all of them.
func selfSources(srcs []*selector, all bool) bool {
	for _, s := range srcs {
		switch s.kind {
		case kindTag, kindTagged, kindPrefix, kindAnywhere:
			return false
		case kindAll:
			if !all {
				return false
			}
		}
	}
	return true
}

// readGrant reads an entry of "grants". It becomes one access for each list of
// protocols in "ip", and others for "app".
func (r *reader) readGrant(i int, v hujson.Value) {
	name := fmt.Sprintf("grants[%d]", i)
	got, ok := r.entry(v, name, grantMembers, "src", "dst")
	if !ok {
		return
	}
	var g grant
	if m, ok := got["src"]; ok {
		g.srcs = r.sources(m.value)
	}
	if m, ok := got["via"]; ok && !isNull(m.value) {
		for _, t := range r.texts(m.value, "via") {
			if !strings.HasPrefix(t.text, "tag:") {
				r.fail(t.at, "name the tag of the routers", "via %q is not a tag", t.text)
			} else if !r.HasTag(t.text) {
				r.fail(t.at, r.nearest(t.text, r.tagNames), "undefined tag %q", t.text)
			}
			g.via = append(g.via, t.text)
		}
	}
	if m, ok := got["ip"]; ok && !isNull(m.value) {
		for _, t := range r.texts(m.value, "ip") {
			r.readIP(&g, t.text, t.at)
		}
	}
	if m, ok := got["app"]; ok && !isNull(m.value) {
		g.app = r.capabilities(m.value, "app", false)
	}
	if len(g.ip) == 0 && len(g.app) == 0 && !r.failed(v) {
		r.fail(v.StartOffset, `"ip": ["*"] allows all protocols and ports`, `ip and app can not both be empty`)
	}
	if m, ok := got["dst"]; ok {
		for _, t := range r.texts(m.value, "dst") {
			sels, ok := r.selectors(t.text, t.at, inDst)
			if !ok {
				continue
			}
			switch kindOf(sels) {
			case kindSelf:
				if !selfSources(g.srcs, false) {
					r.fail(t.at, "", "autogroup:self can only be used with users, groups, or supported autogroups")
				}
			case kindInternet:
				if len(g.app) > 0 {
					r.fail(t.at, "", "app can not be used with autogroup:internet, where nobody would ask for the capability")
				}
			}
			g.dsts = append(g.dsts, sels...)
		}
	}
	r.addGrant(r.origin(name, v.StartOffset), g)
}

// kindOf returns the kind of the selectors of one word: an IP set may be empty.
func kindOf(sels []*selector) kind {
	if len(sels) == 0 {
		return kindPrefix
	}
	return sels[0].kind
}

// failed reports whether something was found wrong within v.
func (r *reader) failed(v hujson.Value) bool {
	line, _ := r.position(v.StartOffset)
	end, _ := r.position(v.EndOffset)
	return slices.ContainsFunc(r.errs, func(e *Error) bool { return line <= e.Line && e.Line <= end })
}

func isNull(v hujson.Value) bool {
	l, ok := v.Value.(hujson.Literal)
	return ok && l.Kind() == 'n'
}

// grant is an entry of "grants" as it stands in the file.
type grant struct {
	srcs, dsts []*selector
	ip         []ipSpec
	app        map[string][]json.RawMessage
	via        []string
}

// ipSpec is what entries of "ip" say about one list of protocols.
type ipSpec struct {
	protos []int
	ports  []portRange
}

// readIP reads an entry of "ip": "*", "22", "80-443", "tcp:80" or "icmp:*".
func (r *reader) readIP(g *grant, s string, at int) {
	var spec ipSpec
	ports, hasPorts := s, true
	if name, rest, ok := strings.Cut(s, ":"); ok {
		if spec.protos, hasPorts, ok = parseProto(name); !ok {
			r.fail(at, `write "tcp:443", "443" or "*"`, "unknown protocol %q", name)
			return
		}
		ports = rest
	}
	list, msg := parsePorts(ports)
	switch {
	case msg != "":
		hint := ""
		if _, _, ok := parseProto(ports); ok && ports == s && !isDigits(s) {
			hint = fmt.Sprintf("write %q for the protocol", s+":*")
		}
		r.fail(at, hint, "ip %q: %s", s, msg)
		return
	case !hasPorts && slices.ContainsFunc(list, func(p portRange) bool { return p != allPorts }):
		r.fail(at, `write "*"`, "ip %q: the protocol has no ports", s)
		return
	}
	spec.ports = list
	for i := range g.ip {
		if slices.Equal(g.ip[i].protos, spec.protos) {
			g.ip[i].ports = append(g.ip[i].ports, list...)
			return
		}
	}
	g.ip = append(g.ip, spec)
}

// add adds an entry of "acls".
func (r *reader) add(o origin, a access) {
	a.origin = r.identify(o, a.srcs, a.dsts, a.protos, nil, nil)
	r.access = append(r.access, a)
}

// addGrant adds an entry of "grants".
func (r *reader) addGrant(o origin, g grant) {
	dsts := viaDests(g.dsts, g.via)
	var said []dest
	for _, d := range g.dsts {
		said = append(said, dest{sel: d})
	}
	id := r.identify(o, g.srcs, said, nil, &g, g.via)
	for _, spec := range g.ip {
		a := access{origin: id, srcs: g.srcs, protos: spec.protos}
		for _, d := range dsts {
			a.dsts = append(a.dsts, dest{d, spec.ports})
		}
		r.access = append(r.access, a)
	}
	if len(g.app) == 0 {
		return
	}
	a := access{origin: id, srcs: g.srcs, app: g.app}
	for _, d := range dsts {
		a.dsts = append(a.dsts, dest{sel: d})
	}
	r.access = append(r.access, a)
	for _, c := range companions {
		if _, ok := g.app[c.name]; ok {
			r.addCompanion(id, g.srcs, dsts, c.brings)
		}
	}
}

// viaDests narrows destinations to what lies behind routers that have one of
// the tags. A router that is no way to a destination is not one to pass by, so
// nodes as destinations of a grant with via are none.
func viaDests(dsts []*selector, via []string) []*selector {
	if len(via) == 0 {
		return dsts
	}
	var out []*selector
	for _, d := range dsts {
		for _, tag := range via {
			switch d.kind {
			case kindPrefix:
				out = append(out, &selector{kind: kindVia, name: tag, prefix: d.prefix})
			case kindInternet:
				out = append(out, &selector{kind: kindViaNet, name: tag})
			}
		}
	}
	return out
}

// addCompanion gives the sources of a grant the capability that theirs needs
// there: who may read the files of others must be able to offer some.
func (r *reader) addCompanion(o ruleOrigin, srcs, dsts []*selector, name string) {
	app := map[string][]json.RawMessage{name: nil}
	back := access{origin: o, app: app, companion: true}
	for _, s := range srcs {
		back.dsts = append(back.dsts, dest{sel: s})
	}
	for _, d := range dsts {
		switch d.kind {
		case kindSelf:
			r.access = append(r.access, access{origin: o, srcs: srcs, dsts: []dest{{sel: d}}, app: app, companion: true})
		case kindInternet:
		default:
			back.srcs = append(back.srcs, d)
		}
	}
	if len(back.srcs) > 0 {
		r.access = append(r.access, back)
	}
}
