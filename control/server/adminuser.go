package server

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"mesh/control/admin"
	"mesh/control/store"
)

// userName is what users may be called: e-mail addresses and login names.
var userName = regexp.MustCompile(`^[a-z0-9][a-z0-9._+-]{0,63}(@[a-z0-9]([a-z0-9.-]{0,126}[a-z0-9])?)?$`)

func (s *Server) adminUser(u store.User) admin.User {
	out := admin.User{ID: u.ID, Name: u.Name, Role: u.Role, Created: u.Created, Suspended: u.Suspended}
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
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	_, taken := s.userByName(name)
	s.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("%w: there is a user %q already", store.ErrConflict, name)
	}
	u, err := s.store.CreateUser(r.Context(), actor(r), name, s.cfg.Now())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[u.ID] = u
	return s.adminUser(u), nil
}

func (s *Server) adminRemoveUser(r *http.Request) (any, error) {
	s.lockOps()
	defer s.opMu.Unlock()
	name := r.PathValue("name")
	s.mu.Lock()
	u, ok := s.userByName(name)
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("user %q: %w", name, store.ErrNotFound)
	}
	if err := s.store.RemoveUser(context.WithoutCancel(r.Context()), actor(r), u.ID, s.cfg.Now()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.users, u.ID)
	delete(s.profiles, u.ID)
	return struct{}{}, nil
}
