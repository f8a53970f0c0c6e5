package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Temporary is access that is given beside the policy file, for a time. It is
// read and compiled as an entry of "grants". Whoever keeps it leaves it out when
// its time is over: a policy has no clock.
type Temporary struct {
	ID     string    // names it in the origin of its rules, "temp[ID]"
	Src    []string  // selectors, as in "src"
	Dst    []string  // selectors, as in "dst" of grants
	IP     []string  // "tcp:22", "443", "*"
	Reason string    // for people
	Until  time.Time // when it ends
}

// With returns the policy with temporary access added, in place of any that p
// has from an earlier With. What is wrong with an addition is an *Error without
// a position that names it.
func (p *Policy) With(extra []Temporary) (*Policy, error) {
	r := &reader{Policy: *p}
	r.access = slices.Clone(p.access[:p.lasting])
	r.users = slices.Clone(p.users)
	for g := range p.groups {
		r.groupNames = append(r.groupNames, g)
	}
	for t := range p.tagOwners {
		r.tagNames = append(r.tagNames, t)
	}
	for h := range p.hosts {
		r.hostNames = append(r.hostNames, h)
	}
	for s := range p.ipsets {
		r.ipsetNames = append(r.ipsetNames, s)
	}
	for _, names := range [][]string{r.groupNames, r.tagNames, r.hostNames, r.ipsetNames} {
		slices.Sort(names)
	}
	var errs []error
	seen := make(map[string]bool)
	for _, t := range extra {
		r.errs = nil
		r.temporary(t, seen[t.ID])
		seen[t.ID] = true
		for _, e := range r.errs {
			e.Line, e.Column = 0, 0
			e.Msg = fmt.Sprintf("temp[%s]: %s", t.ID, e.Msg)
			errs = append(errs, e)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &r.Policy, nil
}

func (r *reader) temporary(t Temporary, again bool) {
	var g grant
	switch {
	case t.ID == "" || strings.ContainsAny(t.ID, "[] \t\r\n"):
		r.fail(0, "", "malformed ID %q", t.ID)
	case again:
		r.fail(0, "", "there are two of this ID")
	case len(t.Src) == 0 || len(t.Dst) == 0 || len(t.IP) == 0:
		r.fail(0, "", "needs a source, a destination and ports")
	case t.Until.IsZero():
		r.fail(0, "", "has no end")
	}
	for _, s := range t.Src {
		if sels, ok := r.selectors(s, 0, inSrc); ok {
			g.srcs = append(g.srcs, sels...)
		}
	}
	for _, s := range t.IP {
		r.readIP(&g, s, 0)
	}
	for _, s := range t.Dst {
		sels, ok := r.selectors(s, 0, inDst)
		if !ok {
			continue
		}
		if kindOf(sels) == kindSelf && !selfSources(g.srcs, false) {
			r.fail(0, "", "autogroup:self can only be used with users, groups, or supported autogroups")
		}
		g.dsts = append(g.dsts, sels...)
	}
	r.addGrant(origin{name: "temp[" + t.ID + "]"}, g)
}
