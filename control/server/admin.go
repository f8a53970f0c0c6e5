package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
)

// localAdmin is the actor in the audit record for callers on the unix socket.
const localAdmin = "local admin"

// defaultKeyLife is how long an auth key is good for if nobody says.
const defaultKeyLife = 90 * 24 * time.Hour

// adminFunc answers an admin request with a value for JSON, or an error.
type adminFunc func(*http.Request) (any, error)

// errInvalid marks what the caller did wrong.
var errInvalid = admin.ErrInvalid

// AdminHandler returns the admin API, for a unix socket that only
// administrators can open: whoever reaches it is owner.
func (s *Server) AdminHandler() http.Handler {
	mux := http.NewServeMux()
	for pattern, f := range map[string]adminFunc{
		"GET /v1/status":            s.adminStatus,
		"GET /v1/users":             s.adminUsers,
		"POST /v1/users":            s.adminCreateUser,
		"DELETE /v1/users/{name}":   s.adminRemoveUser,
		"GET /v1/keys":              s.adminKeys,
		"POST /v1/keys":             s.adminCreateKey,
		"POST /v1/keys/{id}/revoke": s.adminRevokeKey,
		"GET /v1/nodes":             s.adminNodes,
		"GET /v1/nodes/{name}":      s.adminNode,
		"DELETE /v1/nodes/{name}":   s.adminRemoveNode,
		"GET /v1/policy":            s.adminPolicy,
		"PUT /v1/policy":            s.adminSetPolicy,
		"POST /v1/policy/check":     s.adminCheckPolicy,
		"GET /v1/relays":            s.adminRelays,
		"DELETE /v1/relays/{id}":    s.adminRemoveRelay,
		"GET /v1/audit":             s.adminAudit,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			if err != nil {
				s.adminError(w, err)
				return
			}
			writeJSON(w, http.StatusOK, v)
		})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A unix socket is out of a browser's reach; this also holds if
		// somebody puts a proxy before it.
		if r.Host != admin.Host || r.Header.Get("Origin") != "" {
			writeJSON(w, http.StatusForbidden, admin.Error{Message: "not from here"})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 2*admin.MaxPolicy)
		mux.ServeHTTP(w, r)
	})
}

func (s *Server) adminError(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, errInvalid), errors.Is(err, ErrPolicy):
		status = http.StatusBadRequest
	case errors.Is(err, store.ErrNotFound):
		status = http.StatusNotFound
	case errors.Is(err, store.ErrConflict):
		status = http.StatusConflict
	case errors.Is(err, store.ErrFull), errors.Is(err, store.ErrReadOnly):
		status = http.StatusInsufficientStorage
		s.log.Error("store", zap.Error(err))
	default:
		s.log.Error("admin request failed", zap.Error(err))
	}
	writeJSON(w, status, admin.Error{Message: err.Error()})
}

func adminBody(r *http.Request, v any) error {
	if err := decodeStrict(r.Body, v); err != nil {
		return fmt.Errorf("%w: %w", errInvalid, err)
	}
	return nil
}

func (s *Server) adminStatus(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := admin.Status{
		URL: s.cfg.BaseURL, Domain: s.cfg.Domain, Key: s.Key(), Users: len(s.users), Nodes: len(s.nodes.byID),
		Relays: len(s.relays.derpMap().Regions), PolicyVersion: s.policy.Version, DenyAll: s.policy.parsed == nil,
	}
	for _, n := range s.nodes.byID {
		if n.online == presenceOnline {
			st.Online++
		}
	}
	return st, nil
}

// userName is what users may be called: e-mail addresses and login names.
var userName = regexp.MustCompile(`^[a-z0-9][a-z0-9._+-]{0,63}(@[a-z0-9]([a-z0-9.-]{0,126}[a-z0-9])?)?$`)

func (s *Server) adminUser(u store.User) admin.User {
	out := admin.User{ID: u.ID, Name: u.Name, Role: u.Role, Created: u.Created}
	for _, n := range s.nodes.byID {
		if n.User == u.ID {
			out.Nodes++
		}
	}
	return out
}

func (s *Server) adminUsers(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]admin.User, 0, len(s.users))
	for _, u := range s.users {
		out = append(out, s.adminUser(u))
	}
	slices.SortFunc(out, func(a, b admin.User) int { return int(a.ID - b.ID) })
	return out, nil
}

// userByName finds a user. Server.mu is held.
func (s *Server) userByName(name string) (store.User, bool) {
	for _, u := range s.users {
		if strings.EqualFold(u.Name, name) {
			return u, true
		}
	}
	return store.User{}, false
}

func (s *Server) adminCreateUser(r *http.Request) (any, error) {
	var in admin.UserCreate
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	name := strings.ToLower(in.Name)
	if !userName.MatchString(name) {
		return nil, fmt.Errorf("%w: user name %q: want a login name or an e-mail address", errInvalid, in.Name)
	}
	s.opMu.Lock()
	defer s.opMu.Unlock()
	s.mu.Lock()
	_, taken := s.userByName(name)
	s.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("%w: there is a user %q already", store.ErrConflict, name)
	}
	u, err := s.store.CreateUser(r.Context(), localAdmin, name, s.cfg.Now())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[u.ID] = u
	return s.adminUser(u), nil
}

func (s *Server) adminRemoveUser(r *http.Request) (any, error) {
	s.opMu.Lock()
	defer s.opMu.Unlock()
	name := r.PathValue("name")
	s.mu.Lock()
	u, ok := s.userByName(name)
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("user %q: %w", name, store.ErrNotFound)
	}
	if err := s.store.RemoveUser(context.WithoutCancel(r.Context()), localAdmin, u.ID, s.cfg.Now()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.users, u.ID)
	return struct{}{}, nil
}

func (s *Server) adminKey(k store.Key) admin.Key {
	out := admin.Key{
		ID: k.ID, Kind: string(k.Kind), Tags: k.Tags, Reusable: k.Reusable, Ephemeral: k.Ephemeral,
		Created: k.Created, Expires: k.Expires, Revoked: k.Revoked, Used: k.Used, User: s.users[k.User].Name,
	}
	switch k.State(s.cfg.Now()) {
	case nil:
		out.State = "valid"
	case wire.ErrAuthKeyRevoked:
		out.State = "revoked"
	case wire.ErrAuthKeyExpired:
		out.State = "expired"
	case wire.ErrAuthKeyUsed:
		out.State = "used"
	}
	return out
}

func (s *Server) adminKeys(r *http.Request) (any, error) {
	keys, err := s.store.Keys(r.Context())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]admin.Key, 0, len(keys))
	for _, k := range keys {
		out = append(out, s.adminKey(k))
	}
	return out, nil
}

func (s *Server) adminCreateKey(r *http.Request) (any, error) {
	var in admin.KeyCreate
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	// Held so that the user cannot go away in between.
	s.opMu.Lock()
	defer s.opMu.Unlock()
	k, err := s.newKey(in)
	if err != nil {
		return nil, err
	}
	k, secret, err := s.store.CreateKey(r.Context(), localAdmin, k)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return admin.NewKey{Key: s.adminKey(k), Secret: secret}, nil
}

// newKey checks the wish for a key.
func (s *Server) newKey(in admin.KeyCreate) (store.Key, error) {
	now := s.cfg.Now()
	k := store.Key{Kind: store.KeyNode, Reusable: in.Reusable, Ephemeral: in.Ephemeral, Created: now}
	invalid := func(format string, args ...any) (store.Key, error) {
		return store.Key{}, fmt.Errorf("%w: "+format, append([]any{errInvalid}, args...)...)
	}
	if in.Expires < 0 {
		return invalid("a key cannot expire in the past")
	}
	if in.Relay {
		if in.User != "" || len(in.Tags) > 0 || in.Ephemeral {
			return invalid("a relay key has neither user nor tags and is not ephemeral")
		}
		k.Kind, k.Reusable = store.KeyRelay, true // a relay shows it at every start
		if in.Expires > 0 {
			k.Expires = now.Add(in.Expires)
		}
		return k, nil
	}
	if (in.User == "") == (len(in.Tags) == 0) {
		return invalid("a key belongs to a user (--user) or carries tags (--tag): give one of the two")
	}
	k.Expires = now.Add(defaultKeyLife)
	if in.Expires > 0 {
		k.Expires = now.Add(in.Expires)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.User != "" {
		u, ok := s.userByName(in.User)
		if !ok {
			return store.Key{}, fmt.Errorf("user %q: %w: create it with `mesh user create`", in.User, store.ErrNotFound)
		}
		k.User = u.ID
	}
	for _, t := range in.Tags {
		if s.policy.parsed == nil || !s.policy.parsed.HasTag(t) {
			return invalid("tag %q is not in the policy's tagOwners; set a policy that has it first", t)
		}
	}
	k.Tags = in.Tags
	return k, nil
}

func (s *Server) adminRevokeKey(r *http.Request) (any, error) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: key %q: want its number", errInvalid, r.PathValue("id"))
	}
	s.opMu.Lock()
	defer s.opMu.Unlock()
	k, err := s.store.RevokeKey(context.WithoutCancel(r.Context()), localAdmin, id, s.cfg.Now())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for region, rs := range s.relays.streams {
		if rs.key == id {
			s.endRelay(region, wire.CodeRelayKeyUnknown)
		}
	}
	return s.adminKey(k), nil
}

// adminNodeOf describes a node. Server.mu is held.
func (s *Server) adminNodeOf(n *node) admin.Node {
	out := admin.Node{
		ID: n.ID, StableID: n.StableID, Name: n.Name, FullName: n.Name + "." + s.cfg.Domain,
		Addresses: []netip.Addr{n.IPv4, n.IPv6}, User: s.ownerName(&n.Node), Tags: n.Tags, NodeKey: n.Key,
		Online: n.online == presenceOnline, Ephemeral: n.Ephemeral, Created: n.Created,
		Expires: n.Expires, Expired: n.expired, Version: n.Cap, HomeRelay: n.HomeDERP, Endpoints: n.Endpoints,
	}
	if !out.Online {
		out.LastSeen = n.LastSeen
	}
	if n.Hostinfo != nil {
		out.OS = n.Hostinfo.OS
	}
	return out
}

func (s *Server) adminNodes(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]admin.Node, 0, len(s.nodes.byID))
	for _, n := range s.nodes.byID {
		out = append(out, s.adminNodeOf(n))
	}
	slices.SortFunc(out, func(a, b admin.Node) int { return int(a.ID - b.ID) })
	return out, nil
}

// nodeByName finds a node by name, full name, stable ID or address. Server.mu
// is held.
func (s *Server) nodeByName(name string) (*node, error) {
	short := strings.TrimSuffix(strings.ToLower(strings.TrimSuffix(name, ".")), "."+s.cfg.Domain)
	if id, ok := s.nodes.names[short]; ok {
		return s.nodes.byID[id], nil
	}
	addr, _ := netip.ParseAddr(name)
	for _, n := range s.nodes.byID {
		if string(n.StableID) == name || addr.IsValid() && (n.IPv4 == addr || n.IPv6 == addr) {
			return n, nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", clip(name), store.ErrNotFound)
}

func (s *Server) adminNode(r *http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.nodeByName(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	out := s.adminNodeOf(n)
	for _, id := range s.policy.compiled.Visible(n.ID) {
		if p := s.nodes.byID[id]; p != nil {
			out.Peers = append(out.Peers, p.Name)
		}
	}
	slices.Sort(out.Peers)
	return out, nil
}

func (s *Server) adminRemoveNode(r *http.Request) (any, error) {
	return struct{}{}, s.RemoveNode(r.Context(), localAdmin, r.PathValue("name"))
}

// RemoveNode revokes the node with the given name, full name, stable ID or mesh
// address: its peers and the relays drop it at once, its stream ends with
// wire.CodeNodeRevoked, and its key is refused from now on. The error is
// store.ErrNotFound if there is no such node.
func (s *Server) RemoveNode(ctx context.Context, by, name string) error {
	s.opMu.Lock()
	defer s.opMu.Unlock()
	s.mu.Lock()
	n, err := s.nodeByName(name)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	id := n.ID
	s.mu.Unlock()
	return s.remove(ctx, by, id, true)
}

func (s *Server) adminPolicy(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.policy.Policy
	return admin.Policy{Version: p.Version, Text: p.Text, Author: p.Author, Created: p.Created}, nil
}

func (s *Server) adminPolicyBody(r *http.Request) (in admin.PolicySet, warnings []string, err error) {
	if err := adminBody(r, &in); err != nil {
		return in, nil, err
	}
	if len(in.Text) > admin.MaxPolicy {
		return in, nil, fmt.Errorf("%w: policy is longer than %d bytes", errInvalid, admin.MaxPolicy)
	}
	parsed, err := policy.Parse([]byte(in.Text))
	if err != nil {
		return in, nil, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	s.mu.Lock()
	known := make(map[string]bool, len(s.users))
	for _, u := range s.users {
		known[u.Name] = true
	}
	s.mu.Unlock()
	if err := parsed.Check(func(user string) bool { return known[user] }); err != nil {
		warnings = strings.Split(err.Error(), "\n")
	}
	return in, warnings, nil
}

func (s *Server) adminSetPolicy(r *http.Request) (any, error) {
	in, warnings, err := s.adminPolicyBody(r)
	if err != nil {
		return nil, err
	}
	expect := int64(-1)
	if in.Replaces != nil {
		if expect = *in.Replaces; expect < 0 {
			return nil, fmt.Errorf("%w: version %d", errInvalid, expect)
		}
	}
	p, err := s.SetPolicy(r.Context(), localAdmin, in.Text, expect)
	if err != nil {
		return nil, err
	}
	return admin.Policy{Version: p.Version, Text: in.Text, Author: p.Author, Created: p.Created, Warnings: warnings}, nil
}

func (s *Server) adminCheckPolicy(r *http.Request) (any, error) {
	_, warnings, err := s.adminPolicyBody(r)
	if err != nil {
		return nil, err
	}
	return admin.Policy{Warnings: warnings}, nil
}

func (s *Server) adminRelays(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []admin.Relay{}
	for id, region := range s.relays.derpMap().Regions {
		if region == nil || len(region.Nodes) == 0 {
			continue
		}
		r := admin.Relay{Region: id, Code: region.RegionCode, Host: region.Nodes[0].HostName}
		if known, ok := s.relays.known[id]; ok {
			r.Created, r.Connected = known.Created, s.relays.streams[id] != nil
		} else {
			r.BuiltIn = true
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b admin.Relay) int { return a.Region - b.Region })
	return out, nil
}

func (s *Server) adminRemoveRelay(r *http.Request) (any, error) {
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil {
		return nil, fmt.Errorf("%w: region %q: want its number", errInvalid, r.PathValue("id"))
	}
	return struct{}{}, s.removeRelay(context.WithoutCancel(r.Context()), localAdmin, id)
}

// maxAudit bounds one answer.
const maxAudit = 10000

func (s *Server) adminAudit(r *http.Request) (any, error) {
	var since time.Time
	if text := r.URL.Query().Get("since"); text != "" {
		var err error
		if since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return nil, fmt.Errorf("%w: since: %w", errInvalid, err)
		}
	}
	entries, err := s.store.Audit(r.Context(), since, maxAudit)
	if err != nil {
		return nil, err
	}
	out := make([]admin.AuditEntry, 0, len(entries))
	for _, e := range entries {
		out = append(out, admin.AuditEntry(e))
	}
	return out, nil
}
