package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
)

// localAdmin is the actor in the audit record for callers on the unix socket
// of whom no more is known.
const localAdmin = "local admin"

type actorKey struct{}

// WithActor returns a context for connections to AdminHandler whose changes are
// put on record as a person's. The name must be proven: it comes from the
// operating system, not from the caller.
func WithActor(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, actorKey{}, name)
}

// actor is who sends a request.
func actor(r *http.Request) string {
	if name, ok := r.Context().Value(actorKey{}).(string); ok && name != "" {
		return localAdmin + " " + name
	}
	return localAdmin
}

// adminFunc answers an admin request with a value for JSON, or an error.
type adminFunc func(*http.Request) (any, error)

// errInvalid marks what the caller did wrong.
var errInvalid = admin.ErrInvalid

// AdminHandler returns the admin API, for a unix socket that only
// administrators can open: whoever reaches it is owner.
func (s *Server) AdminHandler() http.Handler {
	mux := http.NewServeMux()
	for pattern, f := range map[string]adminFunc{
		"GET /v1/status":                 s.adminStatus,
		"GET /v1/users":                  s.adminUsers,
		"POST /v1/users":                 s.adminCreateUser,
		"DELETE /v1/users/{name}":        s.adminRemoveUser,
		"POST /v1/users/{name}/suspend":  s.adminSuspendUser,
		"POST /v1/users/{name}/resume":   s.adminResumeUser,
		"GET /v1/keys":                   s.adminKeys,
		"POST /v1/keys":                  s.adminCreateKey,
		"POST /v1/keys/{id}/revoke":      s.adminRevokeKey,
		"GET /v1/nodes":                  s.adminNodes,
		"GET /v1/nodes/{name}":           s.adminNode,
		"DELETE /v1/nodes/{name}":        s.adminRemoveNode,
		"POST /v1/nodes/{name}/rename":   s.adminRenameNode,
		"POST /v1/nodes/{name}/owner":    s.adminOwnNode,
		"POST /v1/nodes/{name}/expire":   s.adminExpireNode,
		"POST /v1/nodes/{name}/routes":   s.adminApproveRoutes,
		"GET /v1/logins":                 s.adminLogins,
		"POST /v1/logins/{code}/approve": s.adminApproveLogin,
		"POST /v1/logins/{code}/reject":  s.adminRejectLogin,
		"GET /v1/policy":                 s.adminPolicy,
		"PUT /v1/policy":                 s.adminSetPolicy,
		"POST /v1/policy/check":          s.adminCheckPolicy,
		"GET /v1/policy/versions":        s.adminPolicyVersions,
		"POST /v1/policy/rollback":       s.adminRollback,
		"GET /v1/policy/shadow":          s.adminShadow,
		"PUT /v1/policy/shadow":          s.adminSetShadow,
		"DELETE /v1/policy/shadow":       s.adminClearShadow,
		"GET /v1/policy/shadow/report":   s.adminShadowReport,
		"GET /v1/topology":               s.adminTopology,
		"GET /v1/grants":                 s.adminGrants,
		"POST /v1/grants":                s.adminAddGrant,
		"DELETE /v1/grants/{id}":         s.adminRevokeGrant,
		"GET /v1/relays":                 s.adminRelays,
		"DELETE /v1/relays/{id}":         s.adminRemoveRelay,
		"POST /v1/backup":                s.adminBackup,
		"GET /v1/audit":                  s.adminAudit,
		"GET /v1/audit/head":             s.adminAuditHead,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r.WithContext(store.WithSource(r.Context(), "unix socket")))
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
	case errors.Is(err, wire.ErrAddressesUsedUp):
		status = http.StatusConflict
	case errors.Is(err, store.ErrUnavailable):
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", retryDatabase)
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
	s.logins.prune(s.cfg.Now())
	for _, l := range s.logins.byCode {
		if l.state == loginPending {
			st.Pending++
		}
	}
	return st, nil
}

func (s *Server) adminRelays(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []admin.Relay{}
	for id, region := range s.relays.fixed.Regions {
		for _, n := range region.Nodes {
			out = append(out, admin.Relay{Region: id, Name: n.Name, Code: region.RegionCode, Host: n.HostName, BuiltIn: true})
		}
	}
	mapped := s.relays.mapped()
	for _, k := range s.relays.sorted() {
		out = append(out, admin.Relay{
			Region: k.Region.RegionID, Name: k.node().Name, Code: k.Region.RegionCode, Host: k.node().HostName,
			Created: k.Created, Connected: k.stream != nil, Draining: k.left, Hidden: !slices.Contains(mapped, k),
		})
	}
	slices.SortStableFunc(out, func(a, b admin.Relay) int { return a.Region - b.Region })
	return out, nil
}

func (s *Server) adminRemoveRelay(r *http.Request) (any, error) {
	return struct{}{}, s.removeRelay(context.WithoutCancel(r.Context()), actor(r), r.PathValue("id"))
}

func (s *Server) adminAudit(r *http.Request) (any, error) {
	var since time.Time
	if text := r.URL.Query().Get("since"); text != "" {
		var err error
		if since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return nil, fmt.Errorf("%w: since: %w", errInvalid, err)
		}
	}
	var after int64
	if text := r.URL.Query().Get("after"); text != "" {
		var err error
		if after, err = strconv.ParseInt(text, 10, 64); err != nil {
			return nil, fmt.Errorf("%w: after: %q: want the number of an entry", errInvalid, clip(text))
		}
	}
	entries, err := s.store.Audit(r.Context(), since, after, admin.MaxAudit)
	if err != nil {
		return nil, err
	}
	out := make([]admin.AuditEntry, 0, len(entries))
	for _, e := range entries {
		out = append(out, admin.AuditEntry{
			ID: e.ID, At: e.At, Actor: e.Actor, Source: e.Source, Action: e.Action, Object: e.Object, Detail: e.Detail,
			Before: e.Before, After: e.After, Prev: e.Prev.String(), Hash: e.Hash.String(),
		})
	}
	return out, nil
}

func (s *Server) adminAuditHead(r *http.Request) (any, error) {
	h, err := s.store.AuditHead(r.Context())
	return admin.AuditHead{ID: h.ID, Hash: h.Hash.String()}, err
}
