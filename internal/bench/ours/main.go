// Program ours is this library's side of the benchmark.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/bench/load"
)

func main() { load.Main(load.Stack{Node: newNode, Servers: newServers, Apply: apply}) }

type node struct {
	*mesh.Node
	addr string
}

func newNode(ctx context.Context, a load.NodeArgs) (load.Node, error) {
	n := &mesh.Node{
		Hostname: a.Name, ControlURL: a.Control, AuthKey: a.AuthKey, Ephemeral: true, RelayOnly: a.Relay,
	}
	if a.Lossy {
		n.ListenUDP = listenLossy
	}
	st, err := n.Up(ctx)
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return &node{n, st.Self.Addresses[0].String()}, nil
}

func (n *node) Addr() string { return n.addr }
func (n *node) Listen(port int) (net.Listener, error) {
	return n.Node.Listen("tcp", fmt.Sprintf(":%d", port))
}
func (n *node) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return n.Node.Dial(ctx, "tcp", addr)
}
func (n *node) Peers() int { return len(n.Status().Peers) }

func (n *node) Direct(addr string) bool {
	want := netip.MustParseAddr(addr)
	for _, p := range n.Status().Peers {
		for _, a := range p.Addresses {
			if a == want {
				return p.Path.Kind == "direct"
			}
		}
	}
	return false
}

type servers struct {
	host *host.Host
	dir  string
	once sync.Once
}

func newServers() (load.Servers, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	policy := filepath.Join(dir, "policy")
	const text = `{"tagOwners": {"tag:a": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`
	if err := os.WriteFile(policy, []byte(text), 0o600); err != nil {
		return nil, err
	}
	h, err := host.Start(host.Config{
		DataDir: filepath.Join(dir, "data"), Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", PolicyFile: policy,
	})
	if err != nil {
		return nil, err
	}
	return &servers{host: h, dir: dir}, nil
}

func (s *servers) Info() (load.ServersInfo, error) {
	key, err := admin.NewClient(s.host.Socket()).CreateKey(context.Background(),
		admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Ephemeral: true})
	if err != nil {
		return load.ServersInfo{}, err
	}
	return load.ServersInfo{Control: s.host.URL(), AuthKey: key.Secret}, nil
}

func (s *servers) Fake(int) error { return errors.New("the servers invent no nodes") }

func (s *servers) Groups(n int) ([]string, error) {
	type rule struct {
		Action string   `json:"action"`
		Src    []string `json:"src"`
		Dst    []string `json:"dst"`
	}
	var policy struct {
		TagOwners map[string][]string `json:"tagOwners"`
		ACLs      []rule              `json:"acls"`
	}
	policy.TagOwners = make(map[string][]string)
	tag := func(i int) string { return fmt.Sprintf("tag:group%d", i) }
	for i := range n {
		policy.TagOwners[tag(i)] = []string{}
		policy.ACLs = append(policy.ACLs, rule{"accept", []string{tag(i)}, []string{tag(i) + ":*"}})
	}
	text, err := json.Marshal(policy)
	if err != nil {
		return nil, err
	}
	ctx, c := context.Background(), admin.NewClient(s.host.Socket())
	if _, err := c.SetPolicy(ctx, admin.PolicySet{Text: string(text)}); err != nil {
		return nil, err
	}
	var keys []string
	for i := range n {
		key, err := c.CreateKey(ctx, admin.KeyCreate{Tags: []string{tag(i)}, Reusable: true, Ephemeral: true})
		if err != nil {
			return nil, err
		}
		keys = append(keys, key.Secret)
	}
	return keys, nil
}

func (s *servers) Close() {
	s.once.Do(func() {
		s.host.Close()
		os.RemoveAll(s.dir)
	})
}
