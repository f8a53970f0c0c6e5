package hostaddr

import (
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatchersShareOneSource: it is opened by the first, told to all, and closed
// by the last to go.
func TestWatchersShareOneSource(t *testing.T) {
	var notify func(Change)
	open, opened := 0, 0
	w := watchers{listen: func(n func(Change)) (func(), error) {
		notify, open, opened = n, open+1, opened+1
		return func() { open-- }, nil
	}}
	var a, b []Change
	stopA, err := w.add(func(c Change) { a = append(a, c) })
	if err != nil {
		t.Fatal(err)
	}
	stopB, err := w.add(func(c Change) { b = append(b, c) })
	if err != nil {
		t.Fatal(err)
	}
	notify(Change{Addresses: true})
	stopA()
	stopA()
	notify(Change{Route: true})
	if len(a) != 1 || len(b) != 2 || a[0] != (Change{Addresses: true}) || b[1] != (Change{Route: true}) {
		t.Errorf("told %v and %v", a, b)
	}
	if open != 1 || opened != 1 {
		t.Errorf("%d sources open, %d opened", open, opened)
	}
	stopB()
	if open != 0 {
		t.Error("the source stays open")
	}
	if _, err := w.add(func(Change) {}); err != nil || open != 1 {
		t.Errorf("open %d, %v", open, err)
	}
}

func TestWatchFails(t *testing.T) {
	want := errors.New("no")
	w := watchers{listen: func(func(Change)) (func(), error) { return nil, want }}
	if _, err := w.add(func(Change) {}); err != want {
		t.Errorf("got %v", err)
	}
}

// TestRecent: a list serves others for a moment, but not after a change.
func TestRecent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		w := watchers{up: func() ([]netip.Prefix, error) {
			if asked++; asked == 4 {
				return nil, errors.New("no")
			}
			return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(asked)}), 24)}, nil
		}}
		look := func(want int) {
			t.Helper()
			list, err := w.recent()
			if err != nil || asked != want || list[0].Addr().As4()[3] != byte(want) {
				t.Errorf("%v, %v after %d looks, want %d", list, err, asked, want)
			}
		}
		look(1)
		look(1)
		w.tell(Change{Addresses: true})
		look(2)
		time.Sleep(recentFor)
		look(3)
		w.tell(Change{})
		if _, err := w.recent(); err == nil {
			t.Error("no error")
		}
		look(5)
	})
}

// TestSystem watches the host itself, where it tells, and leaves nothing.
func TestSystem(t *testing.T) {
	stop, err := Watch(func(Change) {})
	if err != nil {
		t.Skip(err)
	}
	defer stop()
	if list, err := Recent(); err != nil || len(list) == 0 {
		t.Errorf("%v, %v", list, err)
	}
}
