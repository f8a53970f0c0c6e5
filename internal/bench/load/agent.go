package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// Node is a node of some stack.
type Node interface {
	Addr() string // the node's own address on its network
	Listen(port int) (net.Listener, error)
	Dial(ctx context.Context, addr string) (net.Conn, error)
	Direct(addr string) bool // traffic to the node with that address takes UDP
	Peers() int              // how many others it sees
	Close() error
}

// NodeArgs tell how to make a node.
type NodeArgs struct {
	Name    string
	Index   int // from 1; no two nodes of a run share one
	Control string
	AuthKey string
	Relay   bool // all traffic by relay
	Lossy   bool // on a network that loses and reorders, where the stack can have one
	MTU     int  // where it can be chosen; 0 = the stack's default
	Count   int  // nodes of the run, where each has to know
}

// Servers are what nodes join.
type Servers interface {
	Info() (ServersInfo, error)
	Fake(n int) error // add nodes to the netmap that do not exist
	// Groups makes groups of nodes that see only those of their own, and
	// returns the key of each.
	Groups(n int) ([]string, error)
	Close()
}

// ServersInfo says how to join.
type ServersInfo struct{ Control, AuthKey string }

// Stack makes nodes, and servers for them.
type Stack struct {
	Node    func(ctx context.Context, a NodeArgs) (Node, error) // returns when the node is up
	Servers func() (Servers, error)                             // nil if nodes need none
	Apply   func(peers int) (Applied, error)                    // nil if that cannot be measured apart
}

// Patience is how long anything may take.
const Patience = 2 * time.Minute

// Request is a line to a process.
type Request struct {
	ID   int64
	Op   string
	Args json.RawMessage
}

// Response is a line from a process.
type Response struct {
	ID     int64
	Error  string          `json:",omitempty"`
	Result json.RawMessage `json:",omitempty"`
}

// agent is a measured process.
type agent struct {
	stack Stack

	mu      sync.Mutex // guards the fields below
	nodes   map[string]Node
	servers Servers
	sinks   map[string]*sink // by node and port
}

// Main serves requests until standard input ends, and ends the process.
func Main(s Stack) {
	a := &agent{stack: s, nodes: make(map[string]Node), sinks: make(map[string]*sink)}
	ops := map[string]func(context.Context, json.RawMessage) (any, error){
		"servers":  op(a.startServers),
		"fake":     op(a.fake),
		"groups":   op(a.groups),
		"halves":   op(a.halves),
		"apply":    op(a.apply),
		"fleet":    op(a.fleet),
		"visit":    op(a.visit),
		"dump":     op(a.dump),
		"up":       op(a.up),
		"down":     op(a.down),
		"peers":    op(a.awaitPeers),
		"serve":    op(a.serve),
		"settle":   op(a.settle),
		"stream":   op(a.stream),
		"spread":   op(a.spread),
		"sunk":     op(a.sunk),
		"http":     op(a.http),
		"pingpong": op(a.pingPong),
		"dials":    op(a.dials),
		"short":    op(a.short),
		"usage":    op(a.usage),
		"profile":  op(a.profile),
	}
	var outMu sync.Mutex
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r Request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			fmt.Fprintln(os.Stderr, "bad request:", err)
			os.Exit(2)
		}
		wg.Go(func() {
			out := Response{ID: r.ID}
			var result any
			err := errors.New("unknown operation " + r.Op)
			if do := ops[r.Op]; do != nil {
				result, err = do(ctx, r.Args)
			}
			if err == nil {
				out.Result, err = json.Marshal(result)
			}
			if err != nil {
				out.Error = err.Error()
			}
			line, _ := json.Marshal(out)
			outMu.Lock()
			defer outMu.Unlock()
			os.Stdout.Write(append(line, '\n'))
		})
	}
	cancel()
	// What is measured is over: there is no need to end in good order, and one
	// of the stacks may not end at all.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, n := range a.nodes {
			n.Close()
		}
		if a.servers != nil {
			a.servers.Close()
		}
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
	}
	os.Exit(0)
}

func op[A any](f func(ctx context.Context, a A) (any, error)) func(context.Context, json.RawMessage) (any, error) {
	return func(ctx context.Context, raw json.RawMessage) (any, error) {
		var a A
		if err := json.Unmarshal(raw, &a); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, Patience)
		defer cancel()
		return f(ctx, a)
	}
}

// None is what operations without arguments take.
type None struct{}

func (a *agent) startServers(context.Context, None) (any, error) {
	if a.stack.Servers == nil {
		return ServersInfo{}, nil
	}
	s, err := a.stack.Servers()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.servers = s
	a.mu.Unlock()
	return s.Info()
}

// FakeArgs say how many nodes to invent.
type FakeArgs struct{ Count int }

func (a *agent) fake(_ context.Context, f FakeArgs) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return nil, a.servers.Fake(f.Count)
}

// Joined says who a node became, and how long that took.
type Joined struct {
	Addr    string
	Seconds float64
}

func (a *agent) up(ctx context.Context, n NodeArgs) (any, error) {
	begin := time.Now()
	node, err := a.stack.Node(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Name, err)
	}
	took := time.Since(begin).Seconds()
	a.mu.Lock()
	a.nodes[n.Name] = node
	a.mu.Unlock()
	return Joined{node.Addr(), took}, nil
}

// NodeName names a node of the process.
type NodeName struct{ Node string }

func (a *agent) node(name string) Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.nodes[name]
}

// PeersArgs say how many peers a node has to see.
type PeersArgs struct {
	Node  string
	Count int
}

func (a *agent) awaitPeers(ctx context.Context, p PeersArgs) (any, error) {
	begin := time.Now()
	for a.node(p.Node).Peers() < p.Count {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s sees %d peers", p.Node, a.node(p.Node).Peers())
		case <-time.After(2 * time.Millisecond):
		}
	}
	return time.Since(begin).Seconds(), nil
}
