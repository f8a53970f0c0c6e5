package hostaddr

import (
	"net/netip"
	"sync"
	"time"
)

// Change says what changed at the host.
type Change struct {
	Addresses bool // addresses or interfaces: worth a look
	Route     bool // a default route: everything goes another way
}

// Watch has notify called whenever the host's network changes, until stop is
// called, which returns when notify does not run any more. notify must be quick
// and not call stop. All watchers of a process share one source of the system
// and its goroutine. The error says that the system does not tell.
func Watch(notify func(Change)) (stop func(), err error) { return host.add(notify) }

// Recent is Up, for those who look often: when many nodes of a process do at once
// only one asks the system. The list is shared, not to be changed. It is never
// older than the last Change, nor than recentFor.
func Recent() ([]netip.Prefix, error) { return host.recent() }

// recentFor is how long a list of addresses serves others.
const recentFor = 100 * time.Millisecond

// host is what the nodes of this process share of the host they are on.
var host = watchers{listen: listen, up: Up}

// watchers are those who want to know of changes.
type watchers struct {
	listen func(notify func(Change)) (end func(), err error)
	up     func() ([]netip.Prefix, error)

	turn sync.Mutex // serialises add and stop; guards end and is taken before mu
	end  func()     // of the source; nil while nobody watches

	mu      sync.Mutex // guards what follows; not held during calls
	all     map[*watcher]struct{}
	changes int // counted

	listing sync.Mutex // serialises lists; guards what follows
	list    []netip.Prefix
	at      time.Time // when list was made; zero = none
	of      int       // changes before that
}

type watcher struct {
	mu     sync.Mutex // guards notify and is held while it runs
	notify func(Change)
}

func (w *watchers) add(notify func(Change)) (stop func(), err error) {
	w.turn.Lock()
	defer w.turn.Unlock()
	if w.end == nil {
		if w.end, err = w.listen(w.tell); err != nil {
			return nil, err
		}
	}
	one := &watcher{notify: notify}
	w.mu.Lock()
	if w.all == nil {
		w.all = make(map[*watcher]struct{})
	}
	w.all[one] = struct{}{}
	w.mu.Unlock()
	return sync.OnceFunc(func() { w.remove(one) }), nil
}

func (w *watchers) remove(one *watcher) {
	one.mu.Lock()
	one.notify = nil
	one.mu.Unlock()
	w.turn.Lock()
	defer w.turn.Unlock()
	w.mu.Lock()
	delete(w.all, one)
	last := len(w.all) == 0
	w.mu.Unlock()
	if last {
		w.end()
		w.end = nil
	}
}

// tell passes a change on.
func (w *watchers) tell(c Change) {
	w.mu.Lock()
	w.changes++
	all := make([]*watcher, 0, len(w.all))
	for one := range w.all {
		all = append(all, one)
	}
	w.mu.Unlock()
	for _, one := range all {
		one.mu.Lock()
		if one.notify != nil {
			one.notify(c)
		}
		one.mu.Unlock()
	}
}

func (w *watchers) recent() ([]netip.Prefix, error) {
	w.listing.Lock()
	defer w.listing.Unlock()
	w.mu.Lock()
	changes := w.changes
	w.mu.Unlock()
	if !w.at.IsZero() && w.of == changes && time.Since(w.at) < recentFor {
		return w.list, nil
	}
	list, err := w.up()
	if err != nil {
		w.at = time.Time{}
		return nil, err
	}
	w.list, w.at, w.of = list, time.Now(), changes
	return list, nil
}
