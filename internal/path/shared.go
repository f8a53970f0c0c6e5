package path

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/identity"
	"mesh/internal/demux"
	"mesh/internal/stun"
)

// Nodes that share a port are several peers at one address to others. Nodes of ours
// tell whose a datagram is by its index, see wireguardUDP. Stock clients take an
// address for the peer whose ping or pong came from there last, and so go to and
// fro between sharers. Little depends on it: whose a WireGuard message is they tell
// by index and key as well, a WireGuard peer stays tied to its node wherever its
// messages come from, paths are found for each node by disco; what goes by address
// are notes of when a node was heard. In 1.90, not in 1.102, one thing hangs on
// those: what comes from an address has the WireGuard peer configured again that
// was silent for five minutes, and that may be the other sharer's. So a handshake
// has to come by relay too, or right after a ping of the same node; ours do both.
// TestStockTalksToSharers and TestStockHearsOfSilentSharer of package interop show
// it.

// rebindSpacing is how soon shared sockets are replaced again at the earliest:
// all who share them hear of a change of the network and find them lacking.
const rebindSpacing = time.Second

// host are the ports that the nodes of this process share. It is global since
// nothing but the process is common to them: a program has them one by one, from
// wherever they are made, and each has to find the others without being told.
var host sharing

// sharing are ports that nodes share. Each port is read by one goroutine, which
// opens what comes; so there is a port for each core before nodes share one.
type sharing struct {
	most int // ports before nodes share; 0 = as many as there are cores

	mu  sync.Mutex // guards what follows; not held while nodes are called
	all []*sharedPort
}

// sharedPort is a port with the nodes that use it.
type sharedPort struct {
	port
	table *demux.Table

	nodes int // guarded by sharing.mu

	usersMu sync.Mutex // guards what follows
	users   map[*Path]struct{}
	mapper  *Path      // who asks the gateway to forward the port; nil = nobody
	mapped  []Endpoint // by which it does
}

// share is a node's part in a shared port.
type share struct {
	of   *sharing
	port *sharedPort
	seat *demux.Seat
	stop sync.Once
	left sync.Once
}

// join gives a node a part in a port: in a new one while there are fewer than
// cores, else in that with the fewest nodes.
func (h *sharing) join(p *Path) (*share, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var least *sharedPort
	for _, t := range h.all {
		if t.nodes < demux.Seats && (least == nil || t.nodes < least.nodes) {
			least = t
		}
	}
	most := h.most
	if most == 0 {
		most = runtime.GOMAXPROCS(0)
	}
	if least == nil || len(h.all) < most {
		t := &sharedPort{table: demux.New(), users: make(map[*Path]struct{})}
		t.init(func(ctx context.Context, number uint16) (*sockets, error) {
			return openHost(ctx, new(net.ListenConfig).ListenPacket, number)
		}, t.table.Take, zap.NewNop())
		t.spacing = rebindSpacing
		if err := t.open(); err == nil {
			least = t
			h.all = append(h.all, t)
		} else if t.shut(); least == nil {
			return nil, err
		}
	}
	least.nodes++
	least.usersMu.Lock()
	least.users[p] = struct{}{}
	p.lent = least.mapped
	least.usersMu.Unlock()
	return &share{of: h, port: least, seat: least.table.Join()}, nil
}

// leave ends a node's part and returns when no datagram is being handed to it any
// more. Who is the last closes the sockets.
func (sh *share) leave(p *Path) {
	sh.seat.Leave()
	t := sh.port
	t.usersMu.Lock()
	delete(t.users, p)
	var others []*Path
	if t.mapper == p { // and has given the mapping back
		others = t.lendLocked(p, nil)
		t.mapper = nil
	}
	t.usersMu.Unlock()
	for _, o := range others {
		o.setLent(nil)
	}
	h := sh.of
	h.mu.Lock()
	t.nodes--
	last := t.nodes == 0
	if last {
		h.all = slices.DeleteFunc(h.all, func(o *sharedPort) bool { return o == t })
	}
	h.mu.Unlock()
	if last {
		t.shut()
		t.readers.Wait()
	}
}

// claim makes a node the one that has the port mapped, unless another is.
func (sh *share) claim(p *Path) bool {
	t := sh.port
	t.usersMu.Lock()
	defer t.usersMu.Unlock()
	if t.mapper == nil {
		t.mapper = p
	}
	return t.mapper == p
}

// lend tells the other nodes where the gateway forwards the port.
func (sh *share) lend(by *Path, list []Endpoint) {
	t := sh.port
	t.usersMu.Lock()
	var others []*Path
	if t.mapper == by {
		others = t.lendLocked(by, list)
	}
	t.usersMu.Unlock()
	for _, p := range others {
		p.setLent(list)
	}
}

// lendLocked returns whom to tell of a list if it is a new one.
func (t *sharedPort) lendLocked(by *Path, list []Endpoint) (others []*Path) {
	if slices.Equal(list, t.mapped) {
		return nil
	}
	t.mapped = list
	for p := range t.users {
		if p != by {
			others = append(others, p)
		}
	}
	return others
}

// ClaimPort reports whether this node is to have its UDP port mapped by the
// gateway. Of nodes that share a port only one is: each would take it from the
// others. What it tells SetEndpoints about holds for all.
func (p *Path) ClaimPort() bool { return p.share == nil || p.share.claim(p) }

// setLent takes the mappings that another node has of the shared port.
func (p *Path) setLent(list []Endpoint) { p.setEndpoints(func() { p.lent = list }) }

// Index returns a receiver index for a handshake of this node: one by which the
// answer finds it.
func (p *Path) Index() uint32 {
	if p.share != nil {
		return p.share.seat.Index()
	}
	return rand.Uint32()
}

// member is a node as those see it who share its port.
type member struct{ p *Path }

// Take implements demux.Node.
func (m member) Take(from netip.AddrPort, datagrams [][]byte) { m.p.fromUDP(from, datagrams) }

// Owns implements demux.Node.
func (m member) Owns(initiation []byte) bool { return m.p.cfg.Owns(initiation) }

// Disco implements demux.Node.
func (m member) Disco(from netip.AddrPort, sender identity.DiscoPublic, packet []byte) demux.Verdict {
	if !usable(from) {
		return demux.Unknown
	}
	return m.p.openDisco(from, sender, packet)
}

// Hold implements demux.Node.
func (m member) Hold(from netip.AddrPort, sender identity.DiscoPublic, packet []byte) {
	if usable(from) {
		m.p.holdDisco(from, sender, packet)
	}
}

// Lost implements demux.Node.
func (m member) Lost(from netip.AddrPort, datagram []byte) {
	if m.p.peers.at(from) != nil {
		m.p.wireguardUDP(from, [][]byte{datagram})
	}
}

// talkLocked tells those who share the port with whom this node exchanges packets.
func (p *Path) talkLocked(old, now identity.DiscoPublic) {
	if p.share == nil || old == now {
		return
	}
	if !now.IsZero() {
		p.share.seat.Talk(now)
	}
	if !old.IsZero() {
		p.share.seat.Hang(old)
	}
}

// newTx returns a transaction id for STUN whose answer finds this node.
func (p *Path) newTx() stun.TxID {
	tx := stun.NewTxID()
	if p.share != nil {
		p.share.seat.Mark(&tx)
	}
	return tx
}
