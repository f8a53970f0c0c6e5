package session

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/engine"
	"mesh/internal/netmap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answers is a control server that says what it was told to say.
type answers struct {
	errs []error // one per request; nil accepts
	reqs []wire.RegisterRequest
}

func (a *answers) Register(_ context.Context, r wire.RegisterRequest) (*wire.RegisterResponse, error) {
	a.reqs = append(a.reqs, r)
	err := a.errs[0]
	a.errs = a.errs[1:]
	if err != nil {
		return nil, err
	}
	return new(wire.RegisterResponse), nil
}

func TestRegister(t *testing.T) {
	refused := func(c wire.ErrorCode) error { return &control.RefusedError{Text: "no", Code: c} }
	away := &control.UnreachableError{URL: "http://x", Err: errors.New("refused")}
	for _, tc := range []struct {
		name      string
		enrolled  bool
		authKey   string
		mayRekey  bool
		errs      []error
		want      error  // nil or what the error matches
		withKey   string // per request: k with the auth key, - without
		otherNode bool   // the node key is another one after it
		old       bool   // the last request names the old key
		after     bool   // Enrolled in the end
	}{
		{name: "known", enrolled: true, authKey: "k", mayRekey: true, errs: []error{nil}, withKey: "-", after: true},
		{name: "new", authKey: "k", mayRekey: true, errs: []error{nil}, withKey: "k", after: true},
		{name: "new, bad key", authKey: "k", mayRekey: true, errs: []error{wire.ErrAuthKeyExpired}, want: wire.ErrAuthKeyExpired, withKey: "k"},
		{name: "new, no key", mayRekey: true, errs: []error{&control.NeedsLoginError{URL: "http://x"}}, want: wire.ErrNeedsLogin, withKey: "-"},
		{name: "unknown", enrolled: true, authKey: "k", mayRekey: true, errs: []error{refused(wire.CodeOf(wire.ErrNodeUnknown)), nil}, withKey: "-k", after: true},
		{name: "needs login", enrolled: true, authKey: "k", mayRekey: true, errs: []error{&control.NeedsLoginError{URL: "http://x"}, nil}, withKey: "-k", after: true},
		{name: "unknown, no key", enrolled: true, mayRekey: true, errs: []error{wire.ErrNodeUnknown}, want: wire.ErrNodeUnknown, withKey: "-", after: true},
		{name: "expired", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrNodeKeyExpired, nil}, withKey: "-k", otherNode: true, old: true, after: true},
		{name: "expired, no key", enrolled: true, mayRekey: true, errs: []error{wire.ErrNodeKeyExpired, wire.ErrNeedsLogin}, want: wire.ErrNodeKeyExpired, withKey: "--", old: true, after: true},
		{name: "expired, login", enrolled: true, mayRekey: true, errs: []error{wire.ErrNodeKeyExpired, &control.NeedsLoginError{URL: "http://x"}}, want: wire.ErrNeedsLogin, withKey: "--", otherNode: true, old: true},
		{name: "removed, no key", enrolled: true, mayRekey: true, errs: []error{wire.ErrNodeRevoked}, want: wire.ErrNodeRevoked, withKey: "-", after: true},
		{name: "expired, bad key", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrNodeKeyExpired, wire.ErrAuthKeyUsed}, want: wire.ErrAuthKeyUsed, withKey: "-k", old: true, after: true},
		{name: "expired, no answer to the new key", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrNodeKeyExpired, away}, want: away, withKey: "-k", otherNode: true, old: true},
		{name: "expired while running", enrolled: true, authKey: "k", errs: []error{wire.ErrNodeKeyExpired}, want: wire.ErrNodeKeyExpired, withKey: "-", after: true},
		{name: "removed", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrNodeRevoked, nil}, withKey: "-k", otherNode: true, after: true},
		{name: "copied", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrMachineMismatch, nil}, withKey: "-k", otherNode: true, after: true},
		{name: "cloned", enrolled: true, authKey: "k", mayRekey: true, errs: []error{wire.ErrCloned}, want: wire.ErrCloned, withKey: "-", after: true},
		{name: "away", enrolled: true, authKey: "k", mayRekey: true, errs: []error{away}, want: away, withKey: "-", after: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			store := new(identity.MemoryStore)
			state, err := identity.LoadState(store)
			if err != nil {
				t.Fatal(err)
			}
			state.Enrolled = tc.enrolled
			if err := state.Save(store); err != nil {
				t.Fatal(err)
			}
			server := &answers{errs: tc.errs}
			e := &enrolment{cfg: Config{AuthKey: tc.authKey}, log: zap.NewNop(), store: store, state: state, server: server}
			err = e.register(t.Context(), tc.mayRekey)
			if !errors.Is(err, tc.want) || err != nil && e.expired != nil && !errors.Is(err, wire.ErrNodeKeyExpired) {
				t.Errorf("error %v", err)
			}
			with := ""
			for _, r := range server.reqs {
				if r.Auth != nil {
					with += "k"
				} else {
					with += "-"
				}
			}
			last := server.reqs[len(server.reqs)-1]
			if with != tc.withKey || (last.OldNodeKey == state.Node.Public()) != tc.old {
				t.Errorf("requests %s, old key %v", with, last.OldNodeKey)
			}
			saved, err := identity.LoadState(store)
			if err != nil || saved != e.state {
				t.Errorf("saved is not what is in use: %v", err)
			}
			if (saved.Node != state.Node) != tc.otherNode || saved.Machine != state.Machine || saved.Enrolled != tc.after {
				t.Errorf("another node %v, enrolled %v", saved.Node != state.Node, saved.Enrolled)
			}
		})
	}
}

func config(t *testing.T) Config {
	return Config{
		Hostname:   "x",
		ControlURL: "http://127.0.0.1:9",
		OpenStore: func() (identity.Store, func() error, error) {
			return new(identity.MemoryStore), func() error { return nil }, nil
		},
		DialTCP: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("nobody home") },
	}
}

func TestStartThatFails(t *testing.T) {
	c := config(t)
	s := Start(c)
	err := s.Wait(t.Context())
	var away *control.UnreachableError
	if !errors.As(err, &away) || !strings.Contains(err.Error(), "nobody home") {
		t.Errorf("error %v", err)
	}
	<-s.Finished()
	if s.WasUp() || s.Err() == nil || s.Starting().Control != err.Error() {
		t.Errorf("up %v, error %v, %+v", s.WasUp(), s.Err(), s.Starting())
	}

	c.OpenStore = func() (identity.Store, func() error, error) { return nil, nil, fs.ErrPermission }
	s = Start(c)
	if err := s.Wait(t.Context()); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("error %v", err)
	}
	<-s.Finished()
}

// A start is stopped while the control server is dialled.
func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := config(t)
		c.DialTCP = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		s := Start(c)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		err := s.Wait(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for control server http://127.0.0.1:9") {
			t.Errorf("wait: %v", err)
		}
		if got := s.Starting().Control; got != "starting" {
			t.Errorf("status %q", got)
		}
		s.Stop(net.ErrClosed)
		s.Stop(errors.New("later"))
		<-s.Finished()
		if err := s.Wait(t.Context()); err != net.ErrClosed {
			t.Errorf("after it: %v", err)
		}
	})
}

func TestWait(t *testing.T) {
	blank := func() *Session {
		return &Session{up: make(chan struct{}), ended: make(chan struct{}), turned: make(chan struct{}), log: zap.NewNop(), cfg: Config{ControlURL: "http://x"}}
	}
	over, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))

	s := blank()
	s.setTrouble(errors.New("no route"))
	if err := s.Wait(over); err == nil || !strings.Contains(err.Error(), "enough") || !strings.Contains(err.Error(), "no route") {
		t.Errorf("in trouble: %v", err)
	}
	if got := s.Starting().Control; got != "starting: no route" {
		t.Errorf("status %q", got)
	}
	close(s.up)
	for range 20 {
		if err := s.Wait(over); err != nil && err.Error() != "enough" {
			t.Errorf("up: %v", err)
		}
	}
	s.end = engine.ErrRevoked
	close(s.ended)
	if err := s.Wait(t.Context()); err != engine.ErrRevoked {
		t.Errorf("ended: %v", err)
	}
	if err := s.Refine(net.ErrClosed); err != engine.ErrRevoked {
		t.Errorf("refined: %v", err)
	}
}

// A login that is pending fails at once whoever cannot wait for it, and is told
// to WaitLogin once.
func TestWaitForLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Session{up: make(chan struct{}), ended: make(chan struct{}), turned: make(chan struct{}), log: zap.NewNop(), cfg: Config{ControlURL: "http://x"}}
		s.setLogin(&control.NeedsLoginError{URL: "http://x/login/1"})
		var login *control.NeedsLoginError
		for _, wait := range []func(context.Context) error{s.Wait, s.WaitLogin, s.Wait, s.WaitStack} {
			if err := wait(t.Context()); !errors.As(err, &login) || login.URL != "http://x/login/1" {
				t.Errorf("%v", err)
			}
		}
		if st := s.Starting(); st.LoginURL != "http://x/login/1" || !strings.Contains(st.Control, "login needed") {
			t.Errorf("%+v", st)
		}
		soon, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begin := time.Now()
		if err := s.WaitLogin(soon); !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &login) || time.Since(begin) != time.Minute {
			t.Errorf("%v", err)
		}
		waited := make(chan error, 1)
		go func() { waited <- s.WaitLogin(t.Context()) }()
		synctest.Wait()
		s.setLogin(&control.NeedsLoginError{URL: "http://x/login/2"}) // the first ran out
		if err := <-waited; !errors.As(err, &login) || login.URL != "http://x/login/2" {
			t.Errorf("%v", err)
		}
		go func() { waited <- s.WaitLogin(t.Context()) }()
		synctest.Wait()
		s.setLogin(nil)
		synctest.Wait()
		close(s.up)
		if err := <-waited; err != nil {
			t.Errorf("%v", err)
		}

		// Its key expires: there is a stack to listen on, and no use else.
		s.bar(wire.ErrNodeKeyExpired)
		if err := s.WaitStack(t.Context()); err != nil {
			t.Errorf("listen: %v", err)
		}
		soon, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Wait(soon); !errors.Is(err, wire.ErrNodeKeyExpired) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while it is renewed: %v", err)
		}
		go func() { waited <- s.Wait(t.Context()) }()
		synctest.Wait()
		s.bar(nil)
		if err := <-waited; err != nil {
			t.Errorf("renewed: %v", err)
		}
	})
}

// A person logs in, late: until then the node asks again, whatever happens.
func TestPassLogin(t *testing.T) {
	at := func(url string) error { return &control.NeedsLoginError{URL: url} }
	for _, tc := range []struct {
		name   string
		errs   []error
		want   error
		asked  string // the followups, by their last character
		wanted error  // the first answer of register; nil: needs a login
	}{
		{name: "at once", errs: []error{nil}, asked: "1"},
		{name: "another URL", errs: []error{at("http://x/2"), nil}, asked: "12"},
		{name: "the server is away for a while", errs: []error{&control.UnreachableError{}, nil}, asked: "11"},
		{name: "refused", errs: []error{wire.ErrTagNotAllowed}, want: wire.ErrTagNotAllowed, asked: "1"},
		{name: "no login", wanted: wire.ErrCloned, want: wire.ErrCloned},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := new(identity.MemoryStore)
				state, err := identity.LoadState(store)
				if err != nil {
					t.Fatal(err)
				}
				first := tc.wanted
				if first == nil {
					first = at("http://x/1")
				}
				server := &answers{errs: append([]error{first}, tc.errs...)}
				s := Start(config(t))
				<-s.Finished()
				s.ctx = t.Context()
				e := &enrolment{log: zap.NewNop(), store: store, state: state, server: server}
				err = s.passLogin(e, e.register(t.Context(), true))
				if !errors.Is(err, tc.want) {
					t.Errorf("error %v", err)
				}
				asked := ""
				for _, r := range server.reqs[1:] {
					asked += r.Followup[len(r.Followup)-1:]
					if r.NodeKey != server.reqs[0].NodeKey || r.Auth != nil {
						t.Errorf("request %+v", r)
					}
				}
				if asked != tc.asked || e.state.Enrolled != (tc.want == nil) {
					t.Errorf("asked %s, enrolled %v", asked, e.state.Enrolled)
				}
				if _, err := s.pendingLogin(); err != nil {
					t.Errorf("still pending: %v", err)
				}
			})
		})
	}
}

func TestRevokedNode(t *testing.T) {
	err := revoked(&control.RefusedError{Code: wire.CodeOf(wire.ErrNodeRevoked)})
	if !errors.Is(err, engine.ErrRevoked) || !strings.Contains(err.Error(), "this node was removed from the mesh") {
		t.Errorf("%v", err)
	}
	if err := revoked(wire.ErrCloned); err != wire.ErrCloned {
		t.Errorf("%v", err)
	}
}

func TestIsSelf(t *testing.T) {
	m, _, err := netmap.Apply(nil, &wire.MapResponse{Node: &wire.Node{
		ID: 1, Name: "Db.mesh.internal.", Key: identity.NewNode().Public(), Hostinfo: &wire.Hostinfo{},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"db": true, "DB": true, "db.": true, "db.mesh.internal": true, "DB.Mesh.Internal.": true,
		"": false, ".": false, "d": false, "db.mesh": false, "mesh.internal": false,
	} {
		if IsSelfName(m, name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	if IsSelfName(new(netmap.Map), "") {
		t.Error("a node without a name is called \"\"")
	}
}
