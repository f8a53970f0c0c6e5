package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"mesh/control/admin"
	"mesh/control/host"
	"mesh/control/policy"
	"mesh/control/wire"
)

// topology is who is in a mesh, as the compiler takes it.
type topology struct {
	users []policy.User
	nodes []policy.Node
	ids   map[string]wire.NodeID // by name
	names map[wire.NodeID]string
}

// newTopology checks and converts what a file or the server says.
func newTopology(in admin.Topology) (*topology, error) {
	t := &topology{ids: make(map[string]wire.NodeID), names: make(map[wire.NodeID]string)}
	byName := make(map[string]policy.User)
	for _, u := range in.Users {
		p := policy.User{Name: u.Name, Email: u.Email, Role: u.Role}
		t.users = append(t.users, p)
		byName[strings.ToLower(u.Name)] = p
	}
	var names []string
	given := 0
	for name, n := range in.Nodes {
		names = append(names, name)
		if n.ID != 0 {
			given++
		}
	}
	if given != 0 && given != len(names) {
		return nil, errors.New("some nodes have an id and some have none")
	}
	slices.Sort(names)
	for i, name := range names {
		n := in.Nodes[name]
		id := n.ID
		if id == 0 {
			id = wire.NodeID(i + 1)
		}
		if other, twice := t.names[id]; twice {
			return nil, fmt.Errorf("nodes %q and %q have the same id", other, name)
		}
		t.ids[name], t.names[id] = id, name
		p := policy.Node{ID: id, User: n.User, Tags: n.Tags, Routes: n.ApprovedRoutes, Offline: n.Offline}
		if u, ok := byName[strings.ToLower(n.User)]; ok {
			p.Email, p.Role = u.Email, u.Role
		}
		for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
			if a.IsValid() {
				p.Addrs = append(p.Addrs, a)
			}
		}
		t.nodes = append(t.nodes, p)
	}
	return t, nil
}

// readTopology reads a topology file, or standard input for "-".
func readTopology(c *call, name string) (*topology, error) {
	b, err := readFile(c, name, admin.MaxBody)
	if err != nil {
		return nil, err
	}
	var in admin.Topology
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fmt.Errorf("topology %s: %w", name, err)
	}
	t, err := newTopology(in)
	if err != nil {
		return nil, fmt.Errorf("topology %s: %w", name, err)
	}
	return t, nil
}

// readFile reads a file, or standard input for "-", limit bytes at most.
func readFile(c *call, name string, limit int64) ([]byte, error) {
	in := c.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: %w than %d bytes", name, errTooLong, limit)
	}
	return b, nil
}

var errTooLong = errors.New("longer")

// known reports whether there is a user of that name.
func (t *topology) known(name string) bool {
	return slices.ContainsFunc(t.users, func(u policy.User) bool {
		return strings.EqualFold(u.Name, name) || u.Email != "" && strings.EqualFold(u.Email, name)
	})
}

// valid parses a policy and runs its own tests. Complaints are those of a
// compiler.
func (t *topology) valid(name string, text []byte) (*policy.Policy, error) {
	p, err := policy.Parse(text)
	if err != nil {
		return nil, complaints(name, err)
	}
	if failures := p.Test(t.nodes, t.users); len(failures) > 0 {
		return nil, failedTests(name, failures)
	}
	return p, nil
}

func failedTests(name string, failures []policy.TestFailure) linesError {
	var lines linesError
	for _, f := range failures {
		lines = append(lines, fmt.Sprintf("%s:%d: %s", shownName(name), f.Line, f.Error()))
	}
	return lines
}

// endpoint finds who is meant by a node's name, a user, tags or an address.
func (t *topology) endpoint(s string) (policy.Endpoint, error) {
	var e policy.Endpoint
	if id, ok := t.ids[s]; ok {
		e.Node = id
		return e, nil
	}
	// A full name begins with the node's.
	if short, _, ok := strings.Cut(strings.ToLower(s), "."); ok && !strings.Contains(s, "@") {
		if _, err := netip.ParseAddr(s); err != nil && t.ids[short] != 0 {
			e.Node = t.ids[short]
			return e, nil
		}
	}
	if strings.HasPrefix(s, "tag:") {
		tags, err := parseTags(s)
		e.Tags = tags
		return e, err
	}
	if a, err := netip.ParseAddr(s); err == nil {
		e.Addr = a.Unmap()
		for _, n := range t.nodes {
			if slices.Contains(n.Addrs, e.Addr) {
				e.Node = n.ID
			}
		}
		return e, nil
	}
	name := strings.TrimSuffix(s, "@")
	for _, u := range t.users {
		if strings.EqualFold(u.Name, name) || strings.EqualFold(u.Email, s) {
			e.User = u
			return e, nil
		}
	}
	if strings.Contains(s, "@") {
		e.User = policy.User{Name: name} // who may yet come
		return e, nil
	}
	return e, fmt.Errorf("%q is no node, user, tag or address", s)
}

// protocols are those with a name.
var protocols = map[string]int{
	"icmp": 1, "igmp": 2, "tcp": 6, "egp": 8, "igp": 9, "udp": 17, "gre": 47, "esp": 50, "ah": 51, "ipv6-icmp": 58, "icmpv6": 58, "sctp": 132,
}

func parseProto(s string) (int, error) {
	if n, ok := protocols[strings.ToLower(s)]; ok {
		return n, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 255 {
		return 0, fmt.Errorf("--proto %q: want tcp, udp, icmp, another name or a number up to 255", s)
	}
	return n, nil
}

// hasPorts reports whether rules judge packets of a protocol by port.
func hasPorts(proto int) bool { return proto == 6 || proto == 17 || proto == 132 }

// splitPort splits "Y:PORT".
func splitPort(s string) (host, port string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i <= 0 || i == len(s)-1 {
		return "", "", fmt.Errorf("%q: want NAME:PORT", s)
	}
	host, port = s[:i], s[i+1:]
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		return host[1 : len(host)-1], port, nil
	}
	if host == "tag" || strings.Count(host, ":") > 1 {
		return "", "", fmt.Errorf("%q: want NAME:PORT, and brackets around an IPv6 address", s)
	}
	return host, port, nil
}

// situation is a policy and the mesh it is for: from files, or from the server.
type situation struct {
	*topology
	file   string // of the policy, "" = the one in force
	policy *policy.Policy
	grants []admin.Grant // those in force
	// version is that of the policy in force; 0 if it is from a file, or there
	// is none.
	version int64
}

// situationFlags bind --policy, --topology and --data.
type situationFlags struct {
	policy, topology, data *string
}

func bindSituation(fs *flag.FlagSet) situationFlags {
	return situationFlags{
		fs.String("policy", "", "policy `FILE` (default: the policy in force)"),
		fs.String("topology", "", "`FILE` with users and nodes (default: those of the server)"),
		dataFlag(fs),
	}
}

// server connects to the server that --data means.
func (f situationFlags) server() (*admin.Client, error) {
	dir, err := dataDir(*f.data)
	if err != nil {
		return nil, err
	}
	return admin.NewClient(filepath.Join(dir, host.SocketName)), nil
}

// who reads the topology file, or asks the server.
func (f situationFlags) who(ctx context.Context, c *call) (*topology, error) {
	if *f.topology != "" {
		return readTopology(c, *f.topology)
	}
	s, err := f.server()
	if err != nil {
		return nil, err
	}
	in, err := s.Topology(ctx)
	if err != nil {
		return nil, err
	}
	return newTopology(in)
}

// read gets all there is to know. With a policy from a file the grants are left
// out: they belong to the policy in force.
func (f situationFlags) read(ctx context.Context, c *call) (*situation, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	t, err := f.who(ctx, c)
	if err != nil {
		return nil, err
	}
	s := &situation{topology: t, file: *f.policy}
	if s.file != "" {
		text, err := readPolicy(c, s.file)
		if err != nil {
			return nil, err
		}
		if s.policy, err = policy.Parse(text); err != nil {
			return nil, complaints(s.file, err)
		}
		return s, nil
	}
	api, err := f.server()
	if err != nil {
		return nil, err
	}
	if s.version, s.policy, s.grants, err = inForce(ctx, api); err != nil {
		return nil, err
	}
	return s, nil
}

// inForce returns the server's policy with the grants beside it; nil = none.
func inForce(ctx context.Context, api *admin.Client) (int64, *policy.Policy, []admin.Grant, error) {
	p, err := api.Policy(ctx)
	if err != nil || p.Version == 0 {
		return 0, nil, nil, err
	}
	parsed, err := policy.Parse([]byte(p.Text))
	if err != nil {
		return 0, nil, nil, fmt.Errorf("policy version %d: %w", p.Version, err)
	}
	grants, err := api.Grants(ctx, false)
	if err != nil {
		return 0, nil, nil, err
	}
	var extra []policy.Temporary
	for _, g := range grants {
		extra = append(extra, policy.Temporary{ID: strconv.FormatInt(g.ID, 10), Src: g.Src, Dst: g.Dst, IP: g.IP, Reason: g.Reason, Until: g.Until})
	}
	with, err := parsed.With(extra)
	if err != nil {
		return 0, nil, nil, fmt.Errorf("grants: %w", err)
	}
	return p.Version, with, grants, nil
}

// named puts the names of nodes in place of their numbers.
func (t *topology) named(s string) string {
	for _, n := range t.nodes {
		s = strings.ReplaceAll(s, fmt.Sprintf("node %d (", n.ID), t.names[n.ID]+" (")
	}
	return s
}
