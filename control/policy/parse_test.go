package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mustParse(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestErrors(t *testing.T) {
	const head = `{"groups": {"group:ops": ["alice@example.com"]}, "tagOwners": {"tag:db": []}, "hosts": {"printer": "10.0.0.7"},` + "\n"
	src := func(s string) string {
		return head + `"acls": [{"action": "accept", "src": [` + s + `], "dst": ["*:*"]}]}`
	}
	dst := func(s string) string {
		return head + `"acls": [{"action": "accept", "src": ["*"], "dst": [` + s + `]}]}`
	}
	for _, tt := range []struct {
		name, text, want string
	}{
		{"empty", "", `parsing value: unexpected EOF at line 1, column 1`},
		{"not an object", `[]`, `policy must be an object at line 1, column 1`},
		{"broken", "{\n  \"acls\": [}", `invalid character '}' at start of value at line 2, column 12`},
		{"member in place of another", "{\n  // comment\n  \"acl\": []}", `unknown member "acl" at line 3, column 3: did you mean "acls"?`},
		{"unlike any member", `{"zzzzzzzz": 1}`, `unknown member "zzzzzzzz" at line 1, column 2`},
		{"not for us", `{"disableIPv4": true}`, `member "disableIPv4" is not supported at line 1, column 2: every node has an address of both kinds`},
		{"column in characters", `{"hosts": {}, /* äöü */ "acl": []}`, `unknown member "acl" at line 1, column 25: did you mean "acls"?`},
		{"duplicate", `{"acls": [], "acls": []}`, `duplicate member "acls" at line 1, column 14`},
		{"duplicate group", `{"groups": {"group:a": [], "group:a": ["x@"]}, "acls": []}`, `duplicate member "group:a" at line 1, column 28`},
		{"byte order mark", "\ufeff{}", `policy starts with a byte order mark at line 1, column 1: save the file without it`},
		{"invalid UTF-8", "{\n \"a\xff\": 1}", `invalid UTF-8 at line 2, column 4`},
		{"acls not an array", `{"acls": {}}`, `"acls" must be an array at line 1, column 10`},
		{"acl not an object", `{"acls": [1]}`, `acls[0] must be an object at line 1, column 11`},
		{"no action", `{"acls": [{"src": ["*"], "dst": ["*:*"]}]}`, `acls[0] has no "action" at line 1, column 11`},
		{"no src", `{"acls": [{"action": "accept", "dst": ["*:*"]}]}`, `acls[0] has no "src" at line 1, column 11`},
		{"deny", `{"acls": [{"action": "deny", "src": ["*"], "dst": ["*:*"]}]}`, `action "deny" at line 1, column 22: everything is denied but what is accepted, so the only action is "accept"`},
		{"old members", `{"acls": [{"action": "accept", "srcs": ["*"], "dst": ["*:*"]}]}`, `unknown member "srcs" at line 1, column 32: did you mean "src"?`},
		{"posture", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "srcPosture": ["posture:a"]}]}`, `"srcPosture": conditions on the state of devices, which a mesh does not know, is not supported at line 1, column 62`},
		{"proto", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "proto": "tpc"}]}`, `unknown protocol "tpc" at line 1, column 71`},
		{"proto 256", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "proto": "256"}]}`, `unknown protocol "256" at line 1, column 71`},
		{"proto 0", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "proto": "0"}]}`, `unknown protocol "0" at line 1, column 71`},
		{"ports of icmp", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:22"], "proto": "icmp"}]}`, `dst "*:22": the protocol has no ports at line 1, column 54: write "*"`},
		{"src a number", src(`5`), `src must be a string at line 2, column 39`},
		{"empty src", src(`""`), `empty src at line 2, column 39`},
		{"undefined group", src(`"group:opps"`), `undefined group "group:opps" at line 2, column 39: did you mean "group:ops"?`},
		{"undefined tag", src(`"tag:web-frontend"`), `undefined tag "tag:web-frontend" at line 2, column 39`},
		{"undefined host", src(`"printr"`), `undefined host "printr" at line 2, column 39: did you mean "printer"?`},
		{"plain login name", src(`"bob"`), `undefined host "bob" at line 2, column 39: a user is written "bob@"`},
		{"bad user", src(`"a@b@c"`), `malformed user "a@b@c" at line 2, column 39`},
		{"bad address", src(`"10.0.0.0/33"`), `"10.0.0.0/33" is neither an address nor a network at line 2, column 39`},
		{"zone", src(`"fe80::1%eth0"`), `"fe80::1%eth0" has a zone at line 2, column 39`},
		{"/0 as src", src(`"0.0.0.0/0"`), `src "0.0.0.0/0" at line 2, column 39: to mean all addresses write "*"`},
		{"self as src", src(`"autogroup:self"`), `"autogroup:self" is not allowed in src at line 2, column 39: it is a destination: the nodes of the source's user`},
		{"autogroup misspelt", src(`"autogroup:members"`), `unknown autogroup "autogroup:members" at line 2, column 39: did you mean "autogroup:member"?`},
		{"autogroup not yet", src(`"autogroup:shared"`), `"autogroup:shared" is not supported at line 2, column 39`},
		{"ipset", src(`"ipset:prod"`), `undefined IP set "ipset:prod" at line 2, column 39`},
		{"no ports", dst(`"*"`), `dst "*" has no ports at line 2, column 53: write "*:*" for all of them`},
		{"tag without ports", dst(`"tag:db"`), `dst "tag:db" has no ports at line 2, column 53: write "tag:db:*" for all of them`},
		{"empty ports", dst(`"tag:db:"`), `dst "tag:db:": no ports at line 2, column 53`},
		{"port by name", dst(`"tag:db:ssh"`), `dst "tag:db:ssh": bad port range "ssh" at line 2, column 53`},
		{"port 0", dst(`"tag:db:0"`), `dst "tag:db:0": port range "0": the first port must be greater than 0; "*" means all at line 2, column 53`},
		{"port 65536", dst(`"tag:db:1-65536"`), `dst "tag:db:1-65536": bad port range "1-65536" at line 2, column 53`},
		{"negative port", dst(`"tag:db:-1"`), `dst "tag:db:-1": bad port range "-1" at line 2, column 53`},
		{"reversed", dst(`"tag:db:9-8"`), `dst "tag:db:9-8": port range "9-8" is reversed at line 2, column 53`},
		{"plus sign", dst(`"tag:db:+9"`), `dst "tag:db:+9": bad port range "+9" at line 2, column 53`},
		{"hole in a list", dst(`"tag:db:80,,443"`), `dst "tag:db:80,,443": bad port range "" at line 2, column 53`},
		{"/0 as dst", dst(`"0.0.0.0/0:*"`), `dst "0.0.0.0/0" at line 2, column 53: to mean all addresses write "*" or "autogroup:internet"`},
		{"self from a tag", head + `"acls": [{"action": "accept", "src": ["tag:db"], "dst": ["autogroup:self:*"]}]}`, `autogroup:self can only be used with users, groups, or supported autogroups at line 2, column 58`},
		{"self before its sources", head + `"acls": [{"dst": ["autogroup:self:*"], "src": ["printer"], "action": "accept"}]}`, `autogroup:self can only be used with users, groups, or supported autogroups at line 2, column 19`},
		{"group in a group", `{"groups": {"group:a": ["group:a"]}}`, `group "group:a" within a group at line 1, column 25: list its members`},
		{"tag in a group", `{"groups": {"group:a": ["tag:b"]}}`, `tag "tag:b" within a group at line 1, column 25: groups have users as members`},
		{"star in a group", `{"groups": {"group:a": ["*"]}}`, `"*" is not allowed in group at line 1, column 25`},
		{"plain name in a group", `{"groups": {"group:a": ["bob"]}}`, `"bob" is not allowed in group at line 1, column 25: a user is written "bob@"`},
		{"group without prefix", `{"groups": {"ops": []}}`, `name "ops" in "groups" does not begin with "group:" at line 1, column 13: did you mean "group:ops"?`},
		{"tag with blanks", `{"tagOwners": {"tag:a b": []}}`, `malformed name "tag:a b" at line 1, column 16: use letters, digits, '-', '_' and '.'`},
		{"tag without name", `{"tagOwners": {"tag:": []}}`, `malformed name "tag:" at line 1, column 16: use letters, digits, '-', '_' and '.'`},
		{"owner is an address", `{"tagOwners": {"tag:a": ["10.0.0.1"]}}`, `"10.0.0.1" is not allowed in tagOwners at line 1, column 26: a user is written "10.0.0.1@"`},
		{"owner unknown", `{"tagOwners": {"tag:a": ["tag:b"]}}`, `undefined tag "tag:b" at line 1, column 26: did you mean "tag:a"?`},
		{"host is a name", `{"hosts": {"a": "b"}}`, `host "a": "b" is neither an address nor a network at line 1, column 17`},
		{"host named like an address", `{"hosts": {"10.0.0.1": "10.0.0.2"}}`, `the name of host "10.0.0.1" is an address at line 1, column 12`},
		{"grant without dst", `{"grants": [{"src": ["*"], "ip": ["*"]}]}`, `grants[0] has no "dst" at line 1, column 13`},
		{"grant of nothing", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": [], "app": {}}]}`, `ip and app can not both be empty at line 1, column 13: "ip": ["*"] allows all protocols and ports`},
		{"grant with an action", `{"grants": [{"action": "accept", "src": ["*"], "dst": ["*"], "ip": ["*"]}]}`, `unknown member "action" at line 1, column 14`},
		{"protocol alone", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["icmp"]}]}`, `ip "icmp": bad port range "icmp" at line 1, column 49: write "icmp:*" for the protocol`},
		{"ports of icmp in a grant", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["icmp:8"]}]}`, `ip "icmp:8": the protocol has no ports at line 1, column 49: write "*"`},
		{"any protocol", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*:80"]}]}`, `unknown protocol "*" at line 1, column 49: write "tcp:443", "443" or "*"`},
		{"two colons", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["tcp:80:90"]}]}`, `ip "tcp:80:90": bad port range "80:90" at line 1, column 49`},
		{"capability with a scheme", `{"grants": [{"src": ["*"], "dst": ["*"], "app": {"https://a.b/c": [{}]}}]}`, `capability name "https://a.b/c" must have the form {domain}/{path} at line 1, column 50: like "example.com/cap/tools"`},
		{"capability of ours", `{"grants": [{"src": ["*"], "dst": ["*"], "app": {"tailscale.com/cap/ingress": []}}]}`, `capability name "tailscale.com/cap/ingress" must not be in the tailscale.com domain at line 1, column 50: use a domain of your own`},
		{"capability on the internet", `{"grants": [{"src": ["*"], "dst": ["autogroup:internet"], "app": {"a.b/c": []}}]}`, `app can not be used with autogroup:internet, where nobody would ask for the capability at line 1, column 36`},
		{"via a user", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "via": ["bob@"]}]}`, `via "bob@" is not a tag at line 1, column 63: name the tag of the routers`},
		{"via nobody", `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "via": ["tag:x"]}]}`, `undefined tag "tag:x" at line 1, column 63`},
		{"self from all in a grant", `{"grants": [{"src": ["*"], "dst": ["autogroup:self"], "ip": ["*"]}]}`, `autogroup:self can only be used with users, groups, or supported autogroups at line 1, column 36`},
		{"everywhere as dst", `{"grants": [{"src": ["*"], "dst": ["autogroup:danger-all"], "ip": ["*"]}]}`, `"autogroup:danger-all" is not allowed in dst at line 1, column 36: to mean all addresses write "*" or "autogroup:internet"`},
		{"domain", src(`"user:*@"`), `malformed selector "user:*@" at line 2, column 39: all users of a domain are written "user:*@example.com", one user "alice@example.com"`},
		{"service", src(`"svc:web"`), `"svc:web" is not supported at line 2, column 39`},
		{"leading zero", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "proto": "06"}]}`, `unknown protocol "06" at line 1, column 71`},
		{"tag begins with a digit", `{"tagOwners": {"tag:1": []}}`, `malformed name "tag:1" at line 1, column 16: begin it with a letter`},
		{"IP set of itself", `{"ipsets": {"ipset:a": ["ipset:b"], "ipset:b": ["ipset:a"]}}`, `IP set "ipset:a" contains itself at line 1, column 49`},
		{"IP set of a user", `{"ipsets": {"ipset:a": ["bob@"]}}`, `"bob@" is not allowed in an IP set at line 1, column 25: name addresses, networks, hosts or other IP sets`},
		{"operation of an IP set", `{"ipsets": {"ipset:a": ["plus 10.0.0.1"]}}`, `unknown operation "plus" at line 1, column 25: write "add …" or "remove …"`},
		{"approver", `{"autoApprovers": {"exitNode": ["10.0.0.1"]}}`, `"10.0.0.1" is not allowed in autoApprovers at line 1, column 33: a user is written "10.0.0.1@"`},
		{"approved network", `{"autoApprovers": {"routes": {"lan": []}}}`, `"lan" is neither an address nor a network at line 1, column 31`},
		{"pool out of range", `{"nodeAttrs": [{"target": ["*"], "ipPool": ["10.0.0.0/8"]}]}`, `ipPool "10.0.0.0/8" is out of range at line 1, column 45: nodes have addresses in 100.64.0.0/10`},
		{"reserved pool", `{"nodeAttrs": [{"target": ["*"], "ipPool": ["100.100.0.0/16"]}]}`, `ipPool "100.100.0.0/16": network within reserved range 100.100.100.0/24 at line 1, column 45`},
		{"attributes of oneself", `{"nodeAttrs": [{"target": ["autogroup:self"], "attr": ["x"]}]}`, `"autogroup:self" is not allowed in target at line 1, column 28: it is a destination: the nodes of the source's user`},
		{"test of nothing", `{"tests": [{"src": "bob@"}]}`, `tests[0] has neither "accept" nor "deny" at line 1, column 12`},
		{"test of a network", `{"tests": [{"src": "bob@", "accept": ["10.0.0.0/8:22"]}]}`, `dst "10.0.0.0/8:22" of a test must be a single host, not a network at line 1, column 39: test an address in it`},
		{"test of two ports", `{"tests": [{"src": "bob@", "deny": ["10.0.0.1:22-23"]}]}`, `dst "10.0.0.1:22-23" of a test must have a single port at line 1, column 37: test each port on its own`},
		{"test of icmp", `{"tests": [{"src": "bob@", "proto": "icmp", "deny": ["10.0.0.1:22"]}]}`, `protocol "icmp" in a test at line 1, column 37: leave it out, or write "tcp", "udp" or "sctp"`},
		{"test of the internet", `{"tests": [{"src": "bob@", "deny": ["autogroup:internet:22"]}]}`, `"autogroup:internet" can not be a destination of a test at line 1, column 37`},
		{"postures", `{"postures": {"posture:a": ["x"]}}`, `member "postures" is not supported at line 1, column 2: a mesh does not know the state of devices`},
		{"host of /0", `{"hosts": {"all": "::/0"}, "acls": [{"action": "accept", "src": ["all"], "dst": []}]}`, `src "all" at line 1, column 66: to mean all addresses write "*"`},
	} {
		p, err := Parse([]byte(tt.text))
		if err == nil || err.Error() != tt.want || p != nil {
			t.Errorf("%s: got\n\t%v\nwant\n\t%s", tt.name, err, tt.want)
			continue
		}
		if got := strings.Contains(tt.want, "not supported"); got != errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: ErrUnsupported is %v", tt.name, !got)
		}
	}
}

func TestSeveralErrors(t *testing.T) {
	_, err := Parse([]byte("{\n\"acls\": [{\"action\": \"accept\", \"src\": [\"group:x\"], \"dst\": [\"tag:y:1\"]}],\n\"ssh\": [{}],\n\"hosts\": {\"a\": 1}}"))
	want := `undefined group "group:x" at line 2, column 39
undefined tag "tag:y" at line 2, column 59
member "ssh" is not supported at line 3, column 1: a mesh has no SSH of its own: allow port 22 in "acls" or "grants"
host "a" must be a string at line 4, column 16`
	if err == nil || err.Error() != want || !errors.Is(err, ErrUnsupported) {
		t.Errorf("got\n%v", err)
	}
	var e *Error
	if !errors.As(err, &e) || e.Line != 2 || e.Column != 39 {
		t.Errorf("first error: %+v", e)
	}
	_, err = Parse([]byte(`{"acls": [` + strings.Repeat(`1,`, 200) + `]}`))
	if n := strings.Count(err.Error(), "\n"); n != maxErrors || !strings.HasSuffix(err.Error(), "and more than 50 errors in all") {
		t.Errorf("%d lines of errors", n)
	}
}

// Everything that is allowed, in the forms in which people write it.
func TestForms(t *testing.T) {
	p := mustParse(t, `// a comment
{
	"groups": {"group:ops": ["Alice@Example.com", "bob@", "alice@example.com",]},
	"tagOwners": {"tag:db": ["group:ops", "carol@example.com"], "tag:web": ["tag:db"], "tag:any": ["autogroup:member"], "tag:none": []},
	"hosts": {"printer": "10.0.0.7", "lan": "10.1.2.3/16", "old": "::ffff:10.9.0.0/112", "six": "fd00:1::/64"},
	"acls": [
		{"action": "accept", "src": ["*", "alice@example.com", "bob@", "group:ops", "tag:db", "autogroup:member", "autogroup:tagged", "printer", "10.0.0.1", "fd00::1", "10.0.0.0/8"],
		 "dst": ["*:*", "tag:db:22,80-90,443", "lan:1", "six:1-65535", "fd00:1::/64:22", "[fd00::5]:22", "fd00::5:23", "autogroup:internet:*", "old:9", "alice@example.com.:1"]},
		{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"], "proto": "tcp"},
		{"action": "accept", "src": [], "dst": [], "proto": "47"},
		{"action": "accept", "src": ["*"], "dst": ["*:*"], "proto": "icmp"},
	],
}`)
	if len(p.access) != 4 || p.access[0].origin.Line != 7 || p.access[1].origin.Line != 9 || p.access[1].origin.Rule != "acls[1]" {
		t.Errorf("rules: %+v", p.access)
	}
	var got []string
	for _, d := range p.access[0].dsts {
		got = append(got, fmt.Sprint(d.sel.kind, d.sel.name, d.sel.prefix, d.ports))
	}
	want := `0invalid Prefix [{0 65535}]
3tag:dbinvalid Prefix [{22 22} {80 90} {443 443}]
810.1.0.0/16 [{1 1}]
8fd00:1::/64 [{1 65535}]
8fd00:1::/64 [{22 22}]
8fd00::5/128 [{22 22}]
8fd00::5/128 [{23 23}]
7invalid Prefix [{0 65535}]
810.9.0.0/16 [{9 9}]
1alice@example.cominvalid Prefix [{1 1}]`
	if s := strings.ReplaceAll(strings.Join(got, "\n"), " 8", "8"); strings.ReplaceAll(s, " ", "") != strings.ReplaceAll(want, " ", "") {
		t.Errorf("destinations:\n%s", s)
	}
	if fmt.Sprint(p.access[3].protos, p.access[2].protos, p.access[1].protos, p.access[0].protos) != "[1] [47] [6] []" {
		t.Error("protocols")
	}
	if fmt.Sprint(p.Tags()) != "[tag:any tag:db tag:none tag:web]" || !p.HasTag("tag:db") || p.HasTag("tag:x") {
		t.Errorf("tags: %v", p.Tags())
	}
	if fmt.Sprint(p.GroupsOf("ALICE@example.com"), p.GroupsOf("bob"), p.GroupsOf("carol")) != "[group:ops] [group:ops] []" {
		t.Error("groups")
	}
	for _, tt := range []struct {
		user, tag string
		want      bool
	}{
		{"alice@example.com", "tag:db", true}, {"ALICE@EXAMPLE.COM", "tag:db", true}, {"bob", "tag:db", true},
		{"carol@example.com", "tag:db", true}, {"carol", "tag:db", false}, {"alice", "tag:db", false},
		{"alice@example.com.evil.org", "tag:db", false}, {"", "tag:db", false}, {"", "tag:any", false},
		{"tag:db", "tag:web", true}, {"tag:web", "tag:web", false}, {"tag:web", "tag:any", false},
		{"alice@example.com", "tag:web", false}, {"zoe", "tag:any", true}, {"zoe", "tag:none", false}, {"zoe", "tag:missing", false},
	} {
		if got := p.TagOwner(tt.user, tt.tag); got != tt.want {
			t.Errorf("%q owns %s: %v", tt.user, tt.tag, got)
		}
	}
	if err := p.Check(func(u string) bool { return u != "bob" }); err == nil || err.Error() != `unknown user "bob" at line 3, column 48` {
		t.Errorf("unknown users: %v", err)
	}
	if err := p.Check(func(string) bool { return true }); err != nil {
		t.Errorf("all users known: %v", err)
	}
}

func TestCommentOnLastLine(t *testing.T) {
	if _, err := Parse([]byte(`{"acls": []} // none`)); err != nil {
		t.Error(err)
	}
}
