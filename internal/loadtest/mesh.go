// Package loadtest puts a control server under the load of thousands of nodes
// and measures what that costs. The nodes are simulated, all in one process: they
// have no data plane, but speak the real protocol, follow their map streams, and
// check after each phase that each of them knows exactly what it should.
//
// The command in folder run has the server in a process of its own, so that CPU
// time and memory are the server's alone.
package loadtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"mesh/control/admin"
	"mesh/control/wire"
	"mesh/identity"
)

// Config says what to put under load, and with what.
type Config struct {
	URL   string                 // of the control server, http://host:port; with commas, those of its replicas
	Key   identity.MachinePublic // of the control server
	Admin *admin.Client          // of the control server, or of a replica that stays; its policy is replaced

	// Nodes is how many nodes there are; those of one group see each other.
	// Group is the size of a group; 0 = all are one.
	Nodes, Group int
	// Parallel is how many nodes begin at a time; 0 = 128.
	Parallel int
	// Resume makes nodes resume their map sessions.
	Resume bool

	// Usage measures the server; nil = it is not measured.
	Usage func() (Usage, error)
	// Log is told what goes on; nil = nobody is.
	Log func(format string, args ...any)
}

// Mesh is a set of simulated nodes.
type Mesh struct {
	cfg   Config
	addrs []string // of the server's replicas
	zstd  *zstd.Decoder
	// texts are the buffers for messages that are taken apart.
	texts chan []byte
	user  string // who owns the nodes if they have no tags

	nodes []*node
	extra int // nodes that were made beside these
	gone  struct {
		msgs  int // that nodes received which were removed since
		bytes int64
	}

	peers   *interned[peer]
	changes *interned[wire.PeerChange]
	watches sync.Map // identity.NodePublic → *watch
	port    atomic.Uint32
	wg      sync.WaitGroup // nodes that run

	busy        atomic.Int64 // answers that asked to come back later
	broken      atomic.Int64 // requests that failed and were made again
	streamsLost atomic.Int64 // map streams that ended by themselves
	lastLoss    atomic.Pointer[error]

	mu         sync.Mutex // guards the members below
	complaints []string   // what must not happen
}

// New returns a mesh without nodes.
func New(cfg Config) (*Mesh, error) {
	var addrs []string
	for text := range strings.SplitSeq(cfg.URL, ",") {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "http" {
			return nil, fmt.Errorf("control server %q: want http://host:port", text)
		}
		addrs = append(addrs, u.Host)
	}
	if cfg.Nodes < 2 {
		return nil, errors.New("want two nodes at least")
	}
	if cfg.Group <= 0 || cfg.Group > cfg.Nodes {
		cfg.Group = cfg.Nodes
	}
	if cfg.Parallel <= 0 {
		cfg.Parallel = 128
	}
	if cfg.Log == nil {
		cfg.Log = func(string, ...any) {}
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(wire.MaxMapMessage))
	if err != nil {
		return nil, err
	}
	m := &Mesh{cfg: cfg, addrs: addrs, zstd: d, peers: newInterned[peer](), changes: newInterned[wire.PeerChange]()}
	m.texts = make(chan []byte, runtime.GOMAXPROCS(0))
	for range cap(m.texts) {
		m.texts <- nil
	}
	return m, nil
}

// Close ends all nodes.
func (m *Mesh) Close() {
	for _, n := range m.nodes {
		if n.end != nil {
			n.end()
		}
	}
	m.wg.Wait()
	m.zstd.Close()
}

func (m *Mesh) complain(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.complaints) < 20 {
		m.complaints = append(m.complaints, fmt.Sprintf(format, args...))
	}
}

// lost notes why a map stream, or what belongs to it, broke.
func (m *Mesh) lost(err error) { m.lastLoss.Store(&err) }

// groups returns how many groups there are.
func (m *Mesh) groups() int { return (m.cfg.Nodes + m.cfg.Group - 1) / m.cfg.Group }

// tagged reports whether nodes have the tag of their group. They have none if
// all are one group and nobody else is beside them.
func (m *Mesh) tagged() bool { return m.groups() > 1 || len(m.addrs) > 1 }

// policy returns a policy in which the nodes of each group may talk to each
// other: without tags everybody to everybody. ports are those of a group that
// differ from "*".
func (m *Mesh) policy(ports map[int]string) string {
	if !m.tagged() {
		p := ports[0]
		if p == "" {
			p = "*"
		}
		return fmt.Sprintf(`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:%s"]}]}`, p)
	}
	var owners, acls []string
	for g := range m.groups() {
		p := ports[g]
		if p == "" {
			p = "*"
		}
		owners = append(owners, fmt.Sprintf("%q: []", groupTag(g)))
		acls = append(acls, fmt.Sprintf(`{"action": "accept", "src": [%q], "dst": ["%s:%s"]}`, groupTag(g), groupTag(g), p))
	}
	if len(m.addrs) > 1 {
		owners = append(owners, fmt.Sprintf("%q: []", realTag))
		acls = append(acls, fmt.Sprintf(`{"action": "accept", "src": [%q], "dst": ["%s:*"]}`, realTag, realTag))
	}
	return "{\"tagOwners\": {" + strings.Join(owners, ", ") + "},\n\"acls\": [" + strings.Join(acls, ",\n") + "]}"
}

func groupTag(g int) string { return fmt.Sprintf("tag:g%d", g) }

// authKey makes a key that nodes of a group enrol with.
func (m *Mesh) authKey(ctx context.Context, group int, ephemeral bool) (string, error) {
	c := admin.KeyCreate{Reusable: true, Ephemeral: ephemeral}
	if m.tagged() {
		c.Tags = []string{groupTag(group)}
	} else {
		c.User = m.user
	}
	k, err := m.cfg.Admin.CreateKey(ctx, c)
	return k.Secret, err
}

// viewers returns the nodes of a group.
func (m *Mesh) viewers(group int) (out []*node) {
	for _, n := range m.nodes {
		if n.group == group {
			out = append(out, n)
		}
	}
	return out
}

// Check compares what each node knows with what is: exactly the other nodes of
// its group, each as it is now.
func (m *Mesh) Check() error {
	groups := make(map[int][]*node)
	for _, n := range m.nodes {
		groups[n.group] = append(groups[n.group], n)
	}
	wrong, first := 0, ""
	bad := func(format string, args ...any) {
		if wrong++; wrong == 1 {
			first = fmt.Sprintf(format, args...)
		}
	}
	for _, group := range groups {
		// A peer is one for all views, so it need not be compared in each.
		right := make(map[wire.NodeID]*peer)
		for _, n := range group {
			n.view.mu.Lock()
			if len(n.view.peers) != len(group)-1 {
				bad("%s knows %d peers, not %d", n.name, len(n.view.peers), len(group)-1)
			}
			for _, o := range group {
				if o == n {
					continue
				}
				p := n.view.peers[wire.NodeID(o.id.Load())]
				switch {
				case p == nil:
					bad("%s does not know %s", n.name, o.name)
				case right[p.id] == p:
				case !p.is(o):
					bad("%s knows %s as it is not", n.name, o.name)
				default:
					right[p.id] = p
				}
			}
			n.view.mu.Unlock()
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d views are wrong: %s", wrong, first)
	}
	return nil
}
