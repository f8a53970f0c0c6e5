package server

import (
	"context"
	"crypto/sha256"
	"reflect"

	"go.uber.org/zap"

	"mesh/control/store"
)

// Logins are stored: an administrator may answer at another replica than the one
// that the machine asks, or when the server has started again.

// row is what is stored of a login. Server.mu is held.
func (l *login) row() store.Login {
	return store.Login{
		Code: l.code, Machine: l.machine, Key: l.key, Old: l.old, Info: l.info, Tags: l.tags, Ephemeral: l.ephemeral, Expiry: l.expiry,
		Version: l.version, Instance: l.instance, Source: l.source, Asked: l.asked, Expires: l.expires, State: int(l.state), Node: l.node,
	}
}

// storeLogin stores a login if what is stored of it is another.
func (s *Server) storeLogin(ctx context.Context, l *login) error {
	s.mu.Lock()
	row := l.row()
	tell := l.place != nil && (l.told == nil || !reflect.DeepEqual(*l.told, row))
	s.mu.Unlock()
	if !tell {
		return nil
	}
	if err := s.store.PutLogin(ctx, row); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.told = &row
	return nil
}

// removeLogins takes logins that are over out of the store.
func (s *Server) removeLogins(ctx context.Context) {
	s.mu.Lock()
	over := s.logins.over
	s.logins.over = nil
	s.mu.Unlock()
	for i, code := range over {
		if err := s.store.RemoveLogin(ctx, code); err != nil {
			s.log.Debug("login could not be removed", zap.Error(err))
			s.mu.Lock()
			s.logins.over = append(s.logins.over, over[i:]...)
			s.mu.Unlock()
			return
		}
	}
}

// followLogins takes in logins that are stored and what other replicas decided.
// opMu is held.
func (s *Server) followLogins(ctx context.Context) error {
	now := s.cfg.Now()
	rows, err := s.store.Logins(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &s.logins
	g.prune(now)
	there := make(map[string]bool, len(rows))
	for _, row := range rows {
		if !row.Expires.After(now) {
			g.over = append(g.over, row.Code)
			continue
		}
		there[row.Code] = true
		l := g.byCode[sha256.Sum256([]byte(row.Code))]
		if l == nil {
			if len(g.byCode) >= maxLogins {
				continue
			}
			l = &login{
				enrolment: enrolment{machine: row.Machine, info: row.Info, tags: row.Tags, ephemeral: row.Ephemeral},
				code:      row.Code, source: row.Source, asked: row.Asked, expires: row.Expires, done: make(chan struct{}),
			}
			g.add(l)
		}
		if l.state != loginPending {
			continue
		}
		if l.waiter == nil {
			l.key, l.old, l.expiry, l.version, l.instance = row.Key, row.Old, row.Expiry, row.Version, row.Instance
		}
		l.told = &row
		if state := loginState(row.State); state != loginPending {
			l.decide(state, row.Node)
		}
	}
	for e := g.order.Front(); e != nil; {
		l := e.Value.(*login)
		e = e.Next()
		if l.told != nil && !there[l.code] {
			l.told = nil // nobody needs to be told again
			g.drop(l)
		}
	}
	return nil
}
