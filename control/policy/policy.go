// Package policy reads the policy of a mesh and says what it means for each
// node.
//
// A policy is a HuJSON file: JSON with comments and trailing commas. It lists
// who may reach what; everything else is denied. LANGUAGE.md says all that can
// stand in it. What has no meaning in a mesh is refused with the reason, never
// ignored: a policy means all that it says.
//
//	{
//	  "groups":    {"group:ops": ["alice@example.com", "bob@"]},
//	  "tagOwners": {"tag:db": ["group:ops"]},
//	  "hosts":     {"printer": "10.0.0.7"},
//	  "acls": [
//	    {"action": "accept", "src": ["group:ops"], "dst": ["tag:db:5432", "printer:*"]},
//	  ],
//	  "grants": [
//	    {"src": ["group:ops"], "dst": ["tag:db"], "ip": ["tcp:22"], "app": {"example.com/cap/db": [{"role": "writer"}]}},
//	  ],
//	  "tests": [{"src": "bob@", "accept": ["tag:db:5432"], "deny": ["tag:db:80"]}],
//	}
//
// A policy goes through three stages. Parse reads and checks a file. Compile
// applies it to the nodes that there are, and Compiled then follows single
// changes of nodes (Upsert, Remove) and of the policy (Replace) at a cost that
// depends on what they touch. Filter, Visible, Routes and Attributes say what
// each node is told; Allows, Explain, Test and Diff answer questions.
package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"mesh/control/wire"
)

// ErrUnsupported matches errors about parts of the policy language that exist
// but are not supported.
var ErrUnsupported = errors.New("not supported")

// Error is one complaint about a policy file.
type Error struct {
	Line, Column int    // 1-based; columns count characters; 0 = not in a file
	Msg          string // what is wrong, "unknown member \"acl\""
	Hint         string // what would be right, or ""
	unsupported  bool
}

// Error returns a form like
//
//	unknown member "acl" at line 3, column 2: did you mean "acls"?
func (e *Error) Error() string {
	s := e.Msg
	if e.Line > 0 {
		s = fmt.Sprintf("%s at line %d, column %d", e.Msg, e.Line, e.Column)
	}
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	return s
}

// Is reports whether target is ErrUnsupported and e is of that kind.
func (e *Error) Is(target error) bool { return target == ErrUnsupported && e.unsupported }

// Policy is a parsed and checked policy. It is immutable.
type Policy struct {
	groups    map[string][]userRef // "group:x" → members
	tagOwners map[string][]*selector
	hosts     map[string]netip.Prefix
	ipsets    map[string][]netip.Prefix
	access    []access
	lasting   int // access[lasting:] are temporary
	attrs     []nodeAttr
	approvers []approver
	tests     []assertion
	users     []namedUser // every mention

	randomPort bool // setting "randomizeClientPort"
}

// access is an entry of "acls", or a part of an entry of "grants": what it
// allows over one list of protocols, or the capabilities that it gives.
type access struct {
	origin wire.RuleOrigin
	srcs   []*selector
	dsts   []dest
	protos []int // nil: the default
	// app gives capabilities and lets no packet through; nil in all others.
	app map[string][]json.RawMessage
	// companion marks what "app" brings with it for its sources.
	companion bool
}

type dest struct {
	sel   *selector
	ports []portRange // nil with app
}

type portRange struct{ first, last uint16 }

// userRef is a user as policies name them: an e-mail address or login name with
// "@" in lower case, or a plain login name, which was written "bob@".
type userRef string

type namedUser struct {
	user         userRef
	line, column int
}

// Check reports the users that the policy names but known does not know, each
// as an *Error. Such a policy is valid (the users may yet come), but a user
// misspelt is the likeliest mistake.
func (p *Policy) Check(known func(user string) bool) error {
	var errs []error
	seen := make(map[userRef]bool)
	for _, u := range p.users {
		if seen[u.user] {
			continue
		}
		seen[u.user] = true
		if !known(string(u.user)) {
			errs = append(errs, &Error{Line: u.line, Column: u.column, Msg: fmt.Sprintf("unknown user %q", u.user)})
			if len(errs) == maxErrors {
				break
			}
		}
	}
	return errors.Join(errs...)
}

// Tags returns the tags that the policy defines, sorted.
func (p *Policy) Tags() []string {
	var tags []string
	for t := range p.tagOwners {
		tags = append(tags, t)
	}
	slices.Sort(tags)
	return tags
}

// HasTag reports whether the policy defines the tag ("tag:…").
func (p *Policy) HasTag(tag string) bool {
	_, ok := p.tagOwners[tag]
	return ok
}

// GroupsOf returns the groups that a user is a member of, sorted.
func (p *Policy) GroupsOf(user string) []string {
	who := canonicalUser(user)
	var out []string
	for g, members := range p.groups {
		if slices.Contains(members, who) {
			out = append(out, g)
		}
	}
	slices.Sort(out)
	return out
}

// canonicalUser is the form in which user names are compared. Only ASCII is
// folded, so that no two letters of other scripts are taken for each other.
func canonicalUser(user string) userRef {
	return userRef(strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, user))
}
