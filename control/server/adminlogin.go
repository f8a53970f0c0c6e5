package server

import (
	"errors"
	"net/http"

	"mesh/control/admin"
	"mesh/control/store"
)

// adminLogins lists the machines that ask to be let in, oldest first.
func (s *Server) adminLogins(*http.Request) (any, error) {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.logins.prune(now)
	out := []admin.Login{}
	for e := s.logins.order.Front(); e != nil; e = e.Next() {
		l := e.Value.(*login)
		if l.state != loginPending {
			continue
		}
		a := admin.Login{
			Code: l.code, URL: s.loginURL(l.code), Hostname: label(l.info.Hostname), OS: plain(l.info.OS),
			Machine: l.machine, NodeKey: l.key, Tags: l.tags, Ephemeral: l.ephemeral,
			Asked: l.asked, Expires: l.expires, Waiting: l.waiter != nil,
		}
		if l.source.IsValid() {
			a.From = l.source.Addr().String()
		}
		if n := s.nodes.byKey[l.old]; n != nil && n.Machine == l.machine {
			a.Renews = n.Name
		}
		out = append(out, a)
	}
	return out, nil
}

func (s *Server) adminApproveLogin(r *http.Request) (any, error) {
	var in admin.NodeOwner
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	id, err := s.ApproveLogin(r.Context(), actor(r), r.PathValue("code"), in.User, in.Tags)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return nil, errors.Join(errors.New("the node was removed meanwhile"), store.ErrNotFound)
	}
	return s.adminNodeOf(n), nil
}

func (s *Server) adminRejectLogin(r *http.Request) (any, error) {
	return struct{}{}, s.RejectLogin(r.Context(), actor(r), r.PathValue("code"))
}
