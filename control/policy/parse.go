package policy

import (
	"errors"
	"fmt"
	"slices"

	"github.com/tailscale/hujson"
)

// Limits on policy files. The parser recurses and builds a tree, so depth and
// number of values are checked before it starts.
const (
	MaxSize   = 4 << 20 // bytes
	maxDepth  = 64
	maxValues = 400_000
	maxErrors = 50
)

// knownMembers of the language. Some are read only to be refused.
var knownMembers = []string{
	"acls", "grants", "groups", "tagOwners", "hosts", "ipsets", "autoApprovers", "nodeAttrs", "tests",
	"ssh", "sshTests", "postures", "defaultSrcPosture", "derpMap", "disableIPv4", "OneCGNATRoute", "randomizeClientPort",
}

// Parse reads and checks a policy file. The error joins one *Error for each
// thing wrong, in the order of the file; errors.Is(err, ErrUnsupported) tells
// that parts of the language are used which this version does not know.
func Parse(src []byte) (*Policy, error) {
	r := &reader{src: src}
	if root, ok := r.load(); ok {
		r.read(root)
	}
	if len(r.errs) > 0 {
		slices.SortStableFunc(r.errs, func(a, b *Error) int {
			if a.Line != b.Line {
				return a.Line - b.Line
			}
			return a.Column - b.Column
		})
		var errs []error
		for _, e := range r.errs {
			errs = append(errs, e)
		}
		if r.more {
			errs = append(errs, fmt.Errorf("and more than %d errors in all", maxErrors))
		}
		return nil, errors.Join(errs...)
	}
	return &r.Policy, nil
}

// reader turns the syntax tree into a Policy.
type reader struct {
	Policy
	src  []byte
	errs []*Error
	more bool // errors beyond maxErrors were left out

	lineStarts []int
	runesAt    []int // characters before each block of runeBlock bytes

	idText  []byte // buffers of identify
	idWords []string

	groupNames, tagNames, hostNames, ipsetNames []string
}

func (r *reader) fail(at int, hint, format string, args ...any) *Error {
	e := &Error{Msg: fmt.Sprintf(format, args...), Hint: hint}
	if len(r.errs) == maxErrors {
		r.more = true
		return e
	}
	e.Line, e.Column = r.position(at)
	r.errs = append(r.errs, e)
	return e
}

func (r *reader) unsupported(at int, format string, args ...any) *Error {
	e := r.fail(at, "", "%s is not supported", fmt.Sprintf(format, args...))
	e.unsupported = true
	return e
}

func (r *reader) read(root hujson.Value) {
	top := make(map[string]member)
	for _, m := range r.members(root, "policy") {
		if !slices.Contains(knownMembers, m.name) {
			r.unknown(m, knownMembers)
			continue
		}
		top[m.name] = m
	}
	// Names first: they are used before they are defined.
	groups := r.names(top, "groups", "group:")
	owners := r.names(top, "tagOwners", "tag:")
	r.groups = make(map[string][]userRef, len(groups))
	for _, m := range groups {
		r.groups[m.name] = nil
		r.groupNames = append(r.groupNames, m.name)
	}
	r.tagOwners = make(map[string][]*selector, len(owners))
	for _, m := range owners {
		r.tagOwners[m.name] = nil
		r.tagNames = append(r.tagNames, m.name)
	}
	r.readHosts(top)
	r.readIPSets(top)
	r.readSettings(top)
	for _, m := range groups {
		r.readGroup(m)
	}
	for _, m := range owners {
		list := []*selector{}
		for _, v := range r.array(m.value, m.name) {
			if s, ok := r.text(v, "owner of a tag"); ok {
				if sel := r.selector(s, v.StartOffset, inOwners); sel != nil {
					list = append(list, sel)
				}
			}
		}
		r.tagOwners[m.name] = list
	}
	acls, someACLs := top["acls"]
	grants, someGrants := top["grants"]
	if someACLs {
		for i, v := range r.array(acls.value, `"acls"`) {
			r.readACL(i, v)
		}
	}
	if someGrants {
		for i, v := range r.array(grants.value, `"grants"`) {
			r.readGrant(i, v)
		}
	}
	if !someACLs && !someGrants {
		// A policy that does not speak of access leaves it open, as everywhere
		// where this language is used. One that says "acls": [] denies everything.
		all := &selector{kind: kindAll}
		r.add(origin{name: "default"}, access{srcs: []*selector{all}, dsts: []dest{{all, []portRange{allPorts}}}})
	}
	r.lasting = len(r.access)
	if m, ok := top["autoApprovers"]; ok && !isNull(m.value) {
		r.readApprovers(m)
	}
	if m, ok := top["nodeAttrs"]; ok && !isNull(m.value) {
		for i, v := range r.array(m.value, `"nodeAttrs"`) {
			r.readNodeAttr(i, v)
		}
	}
	if m, ok := top["tests"]; ok && !isNull(m.value) {
		for i, v := range r.array(m.value, `"tests"`) {
			r.readTest(i, v)
		}
	}
}
