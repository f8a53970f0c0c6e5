package natlab

import (
	"testing"
	"time"

	"mesh/internal/actor"
)

// Pairs of hosts that no table of two places holds: behind one router, behind
// one carrier, and with different families of addresses.
func TestPairs(t *testing.T) {
	for _, c := range []struct {
		name string
		want string
		make func(w *world) (a, b *Host)
	}{
		{"same LAN", "direct", func(w *world) (a, b *Host) {
			r := w.Router("r", Home)
			return r.Host("a"), r.Host("b")
		}},
		{"same LAN, symmetric NAT", "direct", func(w *world) (a, b *Host) {
			r := w.Router("r", Symmetric)
			return r.Host("a"), r.Host("b")
		}},
		{"two homes behind a carrier that turns packets around", "direct", func(w *world) (a, b *Host) {
			r := w.Router("r", HairpinCGN)
			return r.Router("ra", Home).Host("a"), r.Router("rb", Home).Host("b")
		}},
		{"two homes behind a carrier that does not", "relay", func(w *world) (a, b *Host) {
			r := w.Router("r", Home)
			return r.Router("ra", Home).Host("a"), r.Router("rb", Home).Host("b")
		}},
		{"IPv6 only and both families", "direct", func(w *world) (a, b *Host) {
			return w.IPv6Only("a"), w.Public("b")
		}},
		{"IPv6 only and a home with IPv4", "relay", func(w *world) (a, b *Host) {
			return w.IPv6Only("a"), w.Router("r", Home).Host("b")
		}},
		{"a company that lets out the web alone", "relay", func(w *world) (a, b *Host) {
			return w.Router("r", Corporate).Host("a"), w.Public("b")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(w *world) {
				w.config.Listen, w.config.URL = ":80", "http://"+controlName+":80"
			})
			ha, hb := c.make(w)
			a, b := w.node("na", ha), w.node("nb", hb)
			w.await(a, b)
			beat := actor.Beat{Addr: "nb:7", For: 4 * time.Second}
			if c.want == "direct" {
				beat.For, beat.Until = actor.Patience/2, "direct"
			}
			var r actor.Beaten
			a.Must("beat", beat, &r)
			if r.Path != c.want || r.Error != "" {
				t.Errorf("the path is %q %s, want %q", r.Path, r.Error, c.want)
			}
			t.Logf("%s: first answer %v, first direct answer %v", r.Path, round(r.First), round(r.Direct))
		})
	}
}
