package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/filter"
	"mesh/internal/netmap"
)

// Apply puts a snapshot in force; d is what differs from the one before. When
// it returns, packets are judged by the new one alone and connections that it
// no longer allows are reset.
//
// The order matters: addresses that change hands are blocked first, so that the
// old holder never has the new holder's permissions, nor the other way round;
// resets are sent while there still is a tunnel to send them through.
func (e *Engine) Apply(m *netmap.Map, d netmap.Delta) error {
	e.applying.Lock()
	defer e.applying.Unlock()

	// What happens to peers.
	keys := make([]identity.NodePublic, 0, len(d.Added)+len(d.Changed)+len(d.Removed))
	var moving []netip.Prefix            // addresses that leave their holder, or whose holder changes
	var cut []cutOff                     // whose flows end
	var rekeyed [][2]identity.NodePublic // a peer's old and new key
	old := e.Map()
	for _, p := range d.Removed {
		keys = append(keys, p.Key)
		cut = append(cut, cutOff{p, reasonLeft, filter.WithdrawnFromMember})
	}
	for _, c := range d.Changed {
		keys = append(keys, c.New.Key)
		if c.Old.Key != c.New.Key {
			keys = append(keys, c.Old.Key)
			rekeyed = append(rekeyed, [2]identity.NodePublic{c.Old.Key, c.New.Key})
		}
		for _, p := range c.Old.AllowedIPs {
			if !slices.Contains(c.New.AllowedIPs, p) {
				moving = append(moving, p)
			}
		}
		moving = append(moving, taken(old, c.New)...)
		if why, told := lessThanBefore(c); why != "" {
			cut = append(cut, cutOff{c.Old, why, told})
		}
	}
	for _, p := range d.Added {
		keys = append(keys, p.Key)
		moving = append(moving, taken(old, p)...)
	}
	// A peer that is cut off could otherwise connect again before the new
	// snapshot is published, and be taken for what it was.
	for _, c := range cut {
		moving = append(moving, c.peer.AllowedIPs...)
	}

	if len(moving) > 0 {
		e.blocked.Store(&moving)
		e.barrier()
	}

	var errs []error
	if d.Full || d.Self {
		if err := e.link.SetAddrs(ownAddrs(m)); err != nil {
			errs = append(errs, fmt.Errorf("set own addresses: %w", err))
		}
	}
	refused, err := e.swapRules(m, d, rekeyed)
	if err != nil {
		errs = append(errs, err)
	}
	told := e.reset(m, refused, cut)
	e.resetForgotten(m)
	if len(moving) > 0 {
		e.resetMoved(old, m)
	}
	if len(told) > 0 {
		e.tunnel.Drain(lastWords, told...)
	}

	// The filter drops a flow that it meets with another key than it knows, so
	// keys change in filter and map at once.
	e.judging.Lock()
	for _, k := range rekeyed {
		e.filter.Rekey(k[0], k[1])
	}
	e.current.Store(m)
	e.judging.Unlock()
	e.endDials(old, m, cut)
	e.tunnel.Update(keys)
	e.path.Update(keys)
	for _, c := range d.Changed {
		// Another disco key is another process, which has none of the
		// sessions of the one before. Ours say so when they hear from us;
		// stock nodes do not.
		if c.Old.Key == c.New.Key && c.Old.DiscoKey != c.New.DiscoKey && !c.Old.DiscoKey.IsZero() {
			e.tunnel.Renew(c.New.Key)
		}
	}
	if d.Full || d.Relays {
		e.path.SetRelays(m.DERPMap())
	}
	e.blocked.Store(nil)
	if len(errs) > 0 {
		return errs[0]
	}
	return nil
}

// swapRules puts the rules of m in force if d may have changed them, and returns
// the flows that they refuse.
func (e *Engine) swapRules(m *netmap.Map, d netmap.Delta, rekeyed [][2]identity.NodePublic) (refused []filter.Flow, err error) {
	switch {
	case d.Full || d.Self || d.Filter || d.Policy:
		e.rules, err = filter.Compile(m.Filter(), m.PolicyVersion(), ownPrefixes(m))
		if err != nil {
			// A filter that cannot be understood lets nothing in.
			return e.filter.Swap(nil), fmt.Errorf("packet filter refused, nothing is let in: %w", err)
		}
		if s := e.rules.Skipped(); len(s) > 0 {
			e.log.Warn("parts of the packet filter are not understood and allow nothing", zap.Strings("parts", s))
		}
	case e.rules == nil || len(e.rules.Capabilities()) == 0 || len(d.Added)+len(d.Changed)+len(d.Removed) == 0:
		return nil, nil
	}
	return e.filter.Swap(e.rules.WithPeers(peerCaps(m, e.rules.Capabilities(), rekeyed))), nil
}

// peerCaps tells which peers have the capabilities that rules ask for. A peer
// whose key changes has them by both keys until its flows have moved.
func peerCaps(m *netmap.Map, names []string, rekeyed [][2]identity.NodePublic) filter.Peers {
	if len(names) == 0 {
		return filter.Peers{}
	}
	caps := make(map[string]map[identity.NodePublic]bool, len(names))
	for _, name := range names {
		has := make(map[identity.NodePublic]bool)
		for p := range m.Peers() {
			if _, ok := p.CapMap[name]; ok || slices.Contains(p.Node.Capabilities, name) {
				has[p.Key] = true
			}
		}
		for _, k := range rekeyed {
			if has[k[1]] {
				has[k[0]] = true
			}
		}
		caps[name] = has
	}
	return filter.Peers{Caps: caps}
}

// lastWords bounds how long Apply waits for the resets to peers that go.
const lastWords = 100 * time.Millisecond

// taken returns the addresses of p that somebody else holds in old: an address
// of its own, or one that a wider route covered.
func taken(old *netmap.Map, p *netmap.Peer) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range p.AllowedIPs {
		if was, ok := old.PeerByAddr(a.Addr()); ok && was.ID != p.ID {
			out = append(out, a)
		}
	}
	return out
}

// barrier waits until no batch is judged by what was in force before.
func (e *Engine) barrier() {
	e.judging.Lock()
	//lint:ignore SA2001 the empty section is the barrier
	e.judging.Unlock()
}

// cutOff is a peer whose connections end.
type cutOff struct {
	peer *netmap.Peer
	why  string            // for this end
	told filter.Withdrawal // for the other one
}

// lessThanBefore says why connections that a peer opened as what it was must
// not live on as what it is; "" if they may.
func lessThanBefore(c netmap.Change) (why string, told filter.Withdrawal) {
	if c.Old.StableID != c.New.StableID {
		return "it is another node now", filter.WithdrawnFromMember
	}
	if c.Old.User != c.New.User {
		return "it changed its owner", filter.WithdrawnFromOwner
	}
	for _, t := range c.Old.Tags {
		if !slices.Contains(c.New.Tags, t) {
			return "it lost " + t, filter.WithdrawnFromOwner
		}
	}
	if c.New.IsJailed && !c.Old.IsJailed {
		return "it may not begin connections any more", filter.WithdrawnByPolicy
	}
	if c.New.Expired && !c.Old.Expired {
		return reasonExpired, filter.WithdrawnExpired
	}
	return "", 0
}

// reset cuts flows that the new filter refused and all flows of cut-off peers.
// The peers are told first, so that both ends know why. It returns the cut-off
// peers that something is on the way to.
func (e *Engine) reset(next *netmap.Map, refused []filter.Flow, cut []cutOff) (told []identity.NodePublic) {
	old, version := e.Map(), next.PolicyVersion()
	type flowKey struct {
		proto         uint8
		local, remote netip.AddrPort
	}
	byPeer := map[identity.NodePublic][]filter.Flow{}
	for _, f := range refused {
		byPeer[f.Peer] = append(byPeer[f.Peer], f)
	}
	// Who is cut off hears that, although its flows were refused as well.
	for _, c := range cut {
		gone := append(byPeer[c.peer.Key], e.filter.Forget(c.peer.Key)...)
		delete(byPeer, c.peer.Key)
		e.tellOver(c.peer.Key, gone, c.told, version)
		ended := e.link.Abort(func(_ uint8, _, remote netip.AddrPort) bool {
			return contains(c.peer.AllowedIPs, remote.Addr())
		}, &RevokedError{Peer: old.Identity(c.peer), Policy: version, Reason: c.why})
		if ended+len(gone) > 0 {
			told = append(told, c.peer.Key)
		}
	}
	for key, flows := range byPeer {
		e.tellOver(key, flows, filter.WithdrawnByPolicy, version)
		ended := make(map[flowKey]bool, len(flows))
		for _, f := range flows {
			ended[flowKey{f.Proto, f.Local, f.Remote}] = true
		}
		err := &RevokedError{Policy: version, Reason: reasonPolicy}
		if p, ok := old.Peer(key); ok {
			err.Peer = old.Identity(p)
		}
		e.link.Abort(func(proto uint8, local, remote netip.AddrPort) bool {
			return ended[flowKey{proto, local, remote}]
		}, err)
	}
	return told
}

// resetForgotten cuts connections that the filter does not allow and knows no
// flow of: it had to make room for others since the last change of rules, so
// they are not among those that it refused.
func (e *Engine) resetForgotten(next *netmap.Map) {
	evicted := e.filter.Stats().Evicted
	if evicted == e.evicted {
		return
	}
	e.evicted = evicted
	old := e.Map()
	e.link.Abort(func(proto uint8, local, remote netip.AddrPort) bool {
		p, ok := old.PeerByAddr(remote.Addr())
		return ok && !e.filter.Allows(filter.Flow{Proto: proto, Local: local, Remote: remote, Peer: p.Key})
	}, &RevokedError{Policy: next.PolicyVersion(), Reason: reasonPolicy})
}

// resetMoved cuts the flows to addresses that somebody else has now: they would
// go on with a node that did not begin them, under the name of the one that did.
func (e *Engine) resetMoved(old, next *netmap.Map) {
	e.link.Abort(func(_ uint8, _, remote netip.AddrPort) bool {
		was, ok := old.PeerByAddr(remote.Addr())
		if !ok {
			return false
		}
		is, ok := next.PeerByAddr(remote.Addr())
		return !ok || is.ID != was.ID
	}, &RevokedError{Policy: next.PolicyVersion(), Reason: "the address went to another node"})
}

// endDials ends what was begun with peers that are out of reach now while the
// old map was in force: nothing would ever answer.
func (e *Engine) endDials(old, next *netmap.Map, cut []cutOff) {
	for _, c := range cut {
		if p, ok := next.PeerByID(c.peer.ID); ok && !p.Expired {
			continue
		}
		e.link.Abort(func(_ uint8, _, remote netip.AddrPort) bool {
			return contains(c.peer.AllowedIPs, remote.Addr())
		}, &RevokedError{Peer: old.Identity(c.peer), Policy: next.PolicyVersion(), Reason: c.why})
	}
}

// CutAll ends every connection with err: this node is no longer of the mesh.
// Peers are told if that is because its key expired, which they may not know
// yet.
func (e *Engine) CutAll(err error) {
	flows := e.filter.Swap(nil)
	if errors.Is(err, wire.ErrNodeKeyExpired) {
		byPeer := map[identity.NodePublic][]filter.Flow{}
		for _, f := range flows {
			byPeer[f.Peer] = append(byPeer[f.Peer], f)
		}
		for peer, flows := range byPeer {
			e.tellOver(peer, flows, filter.WithdrawnOwnExpired, e.Map().PolicyVersion())
		}
	}
	e.link.Abort(func(uint8, netip.AddrPort, netip.AddrPort) bool { return true }, err)
}

func ownPrefixes(m *netmap.Map) []netip.Prefix {
	if m.Self() == nil {
		return nil
	}
	return m.Self().Addresses
}

func ownAddrs(m *netmap.Map) []netip.Addr {
	var out []netip.Addr
	for _, p := range ownPrefixes(m) {
		out = append(out, p.Addr())
	}
	return out
}
