package control

import (
	"errors"
	"testing"

	"mesh/identity"
)

func TestProven(t *testing.T) {
	pin := identity.NewMachine().Public()
	for _, test := range []struct {
		url string
		pin identity.MachinePublic
		ok  bool
	}{
		{url: "https://control.example.com", ok: true},
		{url: "http://127.0.0.1:8080", ok: true},
		{url: "http://[::1]:8080", ok: true},
		{url: "http://localhost:8080", ok: true},
		{url: "http://192.0.2.1:8080"},
		{url: "http://control.example.com"},
		{url: "http://localhost.example.com"},
		{url: "http://control.example.com", pin: pin, ok: true},
	} {
		c, err := New(Config{URL: test.url, ServerKey: test.pin, Machine: identity.NewMachine()})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Proven(); (err == nil) != test.ok || err != nil && !errors.Is(err, ErrUnproven) {
			t.Errorf("%s, pin %v: %v", test.url, !test.pin.IsZero(), err)
		}
		c.Close()
	}
}

func TestLocal(t *testing.T) {
	for url, want := range map[string]bool{
		"http://127.0.0.1:8080": true, "https://localhost": true, "http://[::1]:1": true,
		"https://mesh.example.com": false, "http://10.0.0.1": false,
	} {
		c, err := New(Config{URL: url, Machine: identity.NewMachine()})
		if err != nil {
			t.Fatal(err)
		}
		if c.Local() != want {
			t.Errorf("%q: %v", url, !want)
		}
		c.Close()
	}
}
