package control

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

func TestNewErrors(t *testing.T) {
	for url, want := range map[string]string{
		"":                         "no control URL is set",
		"control.example.com:8080": "http://host",
		"ftp://host":               `scheme "ftp"`,
		"http://":                  "no host",
		"https://:443":             "no host",
		"http://user:secret@host":  "no meaning",
		"http://host?x=1":          "no meaning",
		"http://a b":               "cannot be read",
		"http://host:port":         "cannot be read",
	} {
		_, err := New(Config{URL: url, Machine: identity.NewMachine()})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want …%s…", url, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error repeats a password", url)
		}
	}
	if _, err := New(Config{URL: "http://host"}); err == nil {
		t.Error("no machine key is fine")
	}
	for url, want := range map[string][2]string{
		"http://h": {"h:80", "http://h"}, "https://h/": {"h:443", "https://h"}, "http://[::1]:8/x/": {"[::1]:8", "http://[::1]:8/x"},
	} {
		c, err := New(Config{URL: url, Machine: identity.NewMachine()})
		if err != nil || c.here().addr != want[0] || c.URL() != want[1] {
			t.Errorf("%q: %v, %+v", url, err, c)
			continue
		}
		c.Close()
	}
}

// inMemory runs test in virtual time, with a fake server and a client of it.
func inMemory(t *testing.T, test func(t *testing.T, f *fake)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newMemory())
		test(t, f)
	})
}

func TestRegister(t *testing.T) {
	var login *NeedsLoginError
	var refused *RefusedError
	var st *StatusError
	for name, test := range map[string]struct {
		answer any
		check  func(*wire.RegisterResponse, error) bool
	}{
		"minimal": {wire.RegisterResponse{MachineAuthorized: true}, func(r *wire.RegisterResponse, err error) bool { return err == nil && r.MachineAuthorized }},
		"login": {wire.RegisterResponse{AuthURL: "https://control.test/a/1"}, func(_ *wire.RegisterResponse, err error) bool {
			return errors.As(err, &login) && login.URL == "https://control.test/a/1" && errors.Is(err, wire.ErrNeedsLogin)
		}},
		"bad login": {wire.RegisterResponse{AuthURL: "javascript:x"}, func(_ *wire.RegisterResponse, err error) bool {
			return err != nil && !errors.As(err, new(*NeedsLoginError))
		}},
		"login with escapes": {wire.RegisterResponse{AuthURL: "https://x/\x1b[2J"}, func(_ *wire.RegisterResponse, err error) bool {
			return err != nil && !errors.As(err, new(*NeedsLoginError))
		}},
		"expired": {wire.RegisterResponse{NodeKeyExpired: true}, func(_ *wire.RegisterResponse, err error) bool { return errors.Is(err, wire.ErrNodeKeyExpired) }},
		"used": {wire.RegisterResponse{Error: "x", MeshCode: wire.CodeAuthKeyUsed}, func(_ *wire.RegisterResponse, err error) bool {
			return errors.Is(err, wire.ErrAuthKeyUsed) && errors.As(err, &refused)
		}},
		"code alone":   {wire.RegisterResponse{MeshCode: wire.CodeTagNotAllowed}, func(_ *wire.RegisterResponse, err error) bool { return errors.Is(err, wire.ErrTagNotAllowed) }},
		"unknown code": {wire.RegisterResponse{MeshCode: "new-thing"}, func(_ *wire.RegisterResponse, err error) bool { return err == nil }},
		"words": {wire.RegisterResponse{Error: "invalid pre auth key\x1b"}, func(_ *wire.RegisterResponse, err error) bool {
			return errors.As(err, &refused) && refused.Text == "invalid pre auth key " && refused.Code == ""
		}},
		"status": {status(403, "go away\n", wire.ErrorHeader, "node-revoked"), func(_ *wire.RegisterResponse, err error) bool {
			return errors.As(err, &st) && st.Status == 403 && st.Text == "go away" && errors.Is(err, wire.ErrNodeRevoked) && IsFatal(err)
		}},
		"busy": {status(429, "", "Retry-After", "20"), func(_ *wire.RegisterResponse, err error) bool {
			return errors.As(err, &st) && RetryAfter(err) >= 20*time.Second && !IsFatal(err)
		}},
		"busy without a time": {status(503, ""), func(_ *wire.RegisterResponse, err error) bool { return RetryAfter(err) == defaultRetryAfter }},
		"garbage":             {status(200, "<html>"), func(_ *wire.RegisterResponse, err error) bool { return err != nil }},
		"endless": {status(200, strings.Repeat(" ", wire.MaxResponseBody+1)), func(_ *wire.RegisterResponse, err error) bool {
			return err != nil && strings.Contains(err.Error(), "too long")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, f *fake) {
				f.early = []byte(`{"nodeKeyChallenge":"chalpub:` + strings.Repeat("ab", 32) + `"}`)
				f.register = func(r wire.RegisterRequest) any {
					if r.Version != wire.CapabilityVersion || r.Hostinfo == nil {
						t.Errorf("request %+v", r)
					}
					return test.answer
				}
				r, err := f.client().Register(t.Context(), wire.RegisterRequest{NodeKey: identity.NewNode().Public()})
				if !test.check(r, err) {
					t.Errorf("got %+v, %v", r, err)
				}
			})
		})
	}
}

func TestLogout(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		key := identity.NewNode().Public()
		c := f.client()
		for _, test := range []struct {
			answer wire.RegisterResponse
			ok     bool
		}{
			{wire.RegisterResponse{NodeKeyExpired: true}, true},
			{wire.RegisterResponse{}, true},
			{wire.RegisterResponse{Error: "gone", MeshCode: wire.CodeNodeUnknown}, true},
			{wire.RegisterResponse{Error: "no"}, false},
		} {
			f.register = func(r wire.RegisterRequest) any {
				if !r.Expiry.Equal(wire.LogoutExpiry) || r.NodeKey != key {
					t.Errorf("request %+v", r)
				}
				return test.answer
			}
			if err := c.Logout(t.Context(), key); (err == nil) != test.ok {
				t.Errorf("%+v: %v", test.answer, err)
			}
		}
		if f.upgrades.Load() != 1 || f.keys.Load() != 1 {
			t.Errorf("%d connections, %d times asked for the key", f.upgrades.Load(), f.keys.Load())
		}
	})
}

func TestUnreachable(t *testing.T) {
	c, err := New(Config{URL: "http://127.0.0.1:1", Machine: identity.NewMachine()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Register(context.Background(), wire.RegisterRequest{})
	var un *UnreachableError
	if !errors.As(err, &un) || un.URL != "http://127.0.0.1:1" {
		t.Fatal(err)
	}
	if !strings.HasPrefix(un.Error(), "control server unreachable: dial tcp 127.0.0.1:1: connect") {
		t.Errorf("%v", un)
	}
}

// Whatever ends a request, the error says what was being done.
func TestDeadline(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		silent := func(ctx context.Context, _, _ string) (net.Conn, error) {
			a, b := net.Pipe()
			t.Cleanup(func() { b.Close() })
			go io.Copy(io.Discard, b)
			return a, nil
		}
		for name, change := range map[string]func(*Config){
			"no key":       func(c *Config) { c.Dial = silent },
			"no handshake": func(c *Config) { c.Dial = silent; c.ServerKey = f.key.Load().Public() },
		} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := f.client(change).Register(ctx, wire.RegisterRequest{})
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "http://control.test") {
				t.Errorf("%s, short: %v", name, err)
			}
			start := time.Now()
			_, err = f.client(change).Register(t.Context(), wire.RegisterRequest{})
			var un *UnreachableError
			if !errors.As(err, &un) || time.Since(start) > dialTime || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s, after %v: %v", name, time.Since(start), err)
			}
		}
		hang := make(chan struct{})
		defer close(hang)
		f.register = func(wire.RegisterRequest) any { <-hang; return nil }
		start := time.Now()
		_, err := f.client().Register(t.Context(), wire.RegisterRequest{})
		var un *UnreachableError
		if !errors.As(err, &un) || time.Since(start) != requestTime {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		// A user who has to log in may take their time.
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Hour, errors.New("nobody came"))
		defer cancel()
		if _, err = f.client().Register(ctx, wire.RegisterRequest{Followup: "x"}); err == nil || !strings.Contains(err.Error(), "nobody came") {
			t.Errorf("%v", err)
		}
	})
}

func TestPin(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		f.register = func(wire.RegisterRequest) any { return wire.RegisterResponse{} }
		c := f.client(func(c *Config) { c.ServerKey = f.key.Load().Public() })
		if _, err := c.Register(t.Context(), wire.RegisterRequest{}); err != nil || f.keys.Load() != 0 {
			t.Errorf("right pin: %v, asked %d times for the key", err, f.keys.Load())
		}
		wrong := identity.NewMachine().Public()
		c = f.client(func(c *Config) { c.ServerKey = wrong })
		_, err := c.Register(t.Context(), wire.RegisterRequest{})
		if !errors.Is(err, ErrServerKeyMismatch) || !strings.Contains(err.Error(), wrong.Short()) || !strings.Contains(err.Error(), f.key.Load().Public().Short()) {
			t.Errorf("wrong pin: %v", err)
		}
	})
}

func TestServerKeyChanges(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		f.register = func(wire.RegisterRequest) any { return wire.RegisterResponse{} }
		c := f.client()
		if _, err := c.Register(t.Context(), wire.RegisterRequest{}); err != nil {
			t.Fatal(err)
		}
		key := identity.NewMachine()
		f.key.Store(&key)
		f.cut()
		synctest.Wait()
		if _, err := c.Register(t.Context(), wire.RegisterRequest{}); err != nil {
			t.Errorf("after the key changed: %v", err)
		}
		if f.keys.Load() != 2 {
			t.Errorf("asked %d times for the key", f.keys.Load())
		}
	})
}

func TestKeyAnswers(t *testing.T) {
	for answer, want := range map[string]string{
		"":                                     "no control server",
		"<html>":                               "no control server",
		`{}`:                                   "has no key",
		`{"publicKey":"mkey:00"}`:              "no control server",
		strings.Repeat(" ", maxKeyBody) + `{}`: "no control server",
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer) }))
		c, _ := New(Config{URL: s.URL, Machine: identity.NewMachine()})
		if _, err := c.Register(t.Context(), wire.RegisterRequest{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", answer, err)
		}
		c.Close()
		s.Close()
	}
	s := httptest.NewServer(http.RedirectHandler("https://elsewhere.test/key", http.StatusFound))
	defer s.Close()
	c, _ := New(Config{URL: s.URL, Machine: identity.NewMachine()})
	defer c.Close()
	if _, err := c.Register(t.Context(), wire.RegisterRequest{}); err == nil || !strings.Contains(err.Error(), "elsewhere.test") {
		t.Errorf("redirect: %v", err)
	}
}

func TestTLS(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := newFake(t, ln)
	f.register = func(wire.RegisterRequest) any { return wire.RegisterResponse{} }
	s := httptest.NewUnstartedServer(f.server.Handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.EnableHTTP2 = true // which the client must not pick for the upgrade
	s.StartTLS()
	defer s.Close()
	defer f.cut()
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"trusted":   {func(c *Config) { c.TLSRootCAs = pool }, ""},
		"pinned":    {func(c *Config) { c.ServerKey = f.key.Load().Public() }, ""},
		"untrusted": {func(c *Config) {}, "certificate"},
	} {
		c := f.client(func(c *Config) { c.URL = s.URL }, test.change)
		_, err := c.Register(t.Context(), wire.RegisterRequest{})
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
}

func TestClose(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		c := f.client()
		errs := make(chan error, 2)
		go func() {
			errs <- c.Stream(t.Context(), func() wire.MapRequest { return wire.MapRequest{} }, func(*wire.MapResponse) error { return nil })
		}()
		<-f.polls
		go c.Close()
		c.Close()
		if err := <-errs; !errors.Is(err, ErrClosed) || !IsFatal(err) {
			t.Errorf("stream: %v", err)
		}
		if _, err := c.Register(t.Context(), wire.RegisterRequest{}); !errors.Is(err, ErrClosed) {
			t.Errorf("register: %v", err)
		}
	})
}

// Requests at the same moment share one connection.
func TestOneConnection(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		f.register = func(wire.RegisterRequest) any { return wire.RegisterResponse{} }
		c := f.client()
		errs := make(chan error)
		for range 20 {
			go func() {
				_, err := c.Register(t.Context(), wire.RegisterRequest{})
				errs <- err
			}()
		}
		for range 20 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if f.upgrades.Load() != 1 {
			t.Errorf("%d connections", f.upgrades.Load())
		}
	})
}
