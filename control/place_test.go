package control

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"mesh/identity"
)

// A client of a server with several places uses one that answers, and goes to
// another when that is gone.
func TestPlaces(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		dial := f.listener.(*memory).dial
		var dead atomic.Pointer[string]
		none := ""
		dead.Store(&none)
		var last atomic.Pointer[string]
		c := f.client(func(cfg *Config) {
			cfg.URL = "http://a, http://b:80/,http://nowhere"
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "nowhere:80" || addr == *dead.Load() {
					return nil, errors.New("refused")
				}
				last.Store(&addr)
				return dial(ctx, network, addr)
			}
		})
		if c.URL() != "http://a,http://b:80,http://nowhere" {
			t.Errorf("URL %s", c.URL())
		}
		for range 4 {
			conn, err := c.connect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			was := *last.Load()
			if again, err := c.connect(t.Context()); err != nil || again != conn {
				t.Errorf("another connection though the first works: %v", err)
			}
			dead.Store(&was)
			c.drop(conn)
			if conn, err = c.connect(t.Context()); err != nil || *last.Load() == was {
				t.Fatalf("after %s went away: at %s, %v", was, *last.Load(), err)
			}
			c.drop(conn)
		}
	})
}

func TestPlacesAreProvenTogether(t *testing.T) {
	for url, ok := range map[string]bool{
		"https://a,https://b": true, "https://a,http://b": false, "http://127.0.0.1,http://[::1]": true, "http://127.0.0.1,http://a": false,
	} {
		c, err := New(Config{URL: url, Machine: identity.NewMachine()})
		if err != nil {
			t.Fatal(err)
		}
		if (c.Proven() == nil) != ok {
			t.Errorf("%s: %v", url, c.Proven())
		}
		c.Close()
	}
	if _, err := New(Config{URL: "https://a,,https://b", Machine: identity.NewMachine()}); err == nil {
		t.Error("an empty place is fine")
	}
}
