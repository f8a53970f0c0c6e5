package session

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

// The node's own key expires by its watch, but the control server that can be
// asked has the last word.
func TestOwnExpiry(t *testing.T) {
	away := &control.UnreachableError{URL: "http://x", Err: errors.New("refused")}
	for _, tc := range []struct {
		name  string
		after time.Duration // until the key expires; 0 = never
		errs  []error       // answers of the control server
		want  error
		took  time.Duration
	}{
		{name: "never", took: time.Hour},
		{name: "later", after: 2 * time.Hour, took: time.Hour},
		{name: "expired", after: 90 * time.Second, errs: []error{wire.ErrNodeKeyExpired}, want: wire.ErrNodeKeyExpired, took: 90 * time.Second},
		{name: "control is away", after: 10 * time.Minute, errs: []error{away}, want: wire.ErrNodeKeyExpired, took: 10 * time.Minute},
		{name: "control does not mind", after: time.Minute, errs: []error{nil}, took: time.Hour},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(30 * 365 * 24 * time.Hour) // the clock of the bubble begins at 2000, when no clock can be right
				begin := time.Now()
				key := identity.NewNode().Public()
				self := &wire.Node{ID: 1, StableID: "s1", Name: "n.mesh.internal.", Key: key, Hostinfo: &wire.Hostinfo{}}
				if tc.after != 0 {
					self.KeyExpiry = begin.Add(tc.after)
				}
				m, _, err := netmap.Apply(nil, &wire.MapResponse{Node: self})
				if err != nil {
					t.Fatal(err)
				}
				server := &answers{errs: tc.errs}
				s := &Session{log: zap.NewNop(), maps: appliedMaps{m, m}}
				e := &enrolment{log: zap.NewNop(), server: server}
				e.public.Store(&key)
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				watched, end := context.WithCancelCause(ctx)
				w := s.watchExpiry(watched, e, end)
				<-watched.Done()
				if err := context.Cause(watched); tc.want != nil && !errors.Is(err, tc.want) || tc.want == nil && ctx.Err() == nil {
					t.Errorf("error %v", err)
				}
				end(nil)
				w.close()
				if took := time.Since(begin); took != tc.took {
					t.Errorf("it took %v, want %v", took, tc.took)
				}
				if len(server.errs) != 0 {
					t.Error("the control server was not asked")
				}
				for _, r := range server.reqs {
					if r.NodeKey != key || r.Auth != nil || !r.Expiry.IsZero() {
						t.Errorf("asked %+v", r)
					}
				}
			})
		})
	}
}
