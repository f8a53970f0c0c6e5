package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
	"mesh/internal/pgserver/pgtest"
)

// Two control servers over one database, one of them killed under changes: what
// was acknowledged is there, all nodes are at the other one soon, and a
// connection between two of them notices nothing.
func TestReplicaIsKilled(t *testing.T) {
	database := pgtest.Database(t)
	var procs []*actor.Process
	var ready [2]actor.ControlReady
	var admins []*admin.Client
	urls := ""
	for i := range ready {
		name := fmt.Sprint("control", i)
		procs = append(procs, actor.Start(t, "control", name, actor.ControlConfig{
			DataDir: filepath.Join(t.TempDir(), "c"), Listen: "127.0.0.1:0", Relay: true, STUN: "127.0.0.1:0", Database: database,
		}, &ready[i]))
		admins = append(admins, admin.NewClient(ready[i].Socket))
		urls += "," + ready[i].URL
	}
	if ready[0].Key != ready[1].Key {
		t.Fatal("the replicas have different keys")
	}
	ctx := t.Context()
	if _, err := admins[0].SetPolicy(ctx, admin.PolicySet{Text: `{"tagOwners": {"tag:a": []}, "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:*"]}]}`}); err != nil {
		t.Fatal(err)
	}
	// A key of one replica, for nodes that come to either.
	key, err := admins[1].CreateKey(ctx, admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true})
	if err != nil {
		t.Fatal(err)
	}
	node := func(name string) *mesh.Node {
		n := &mesh.Node{
			Hostname: name, ControlURL: urls[1:], ControlKey: ready[0].Key, AuthKey: key.Secret,
			Dir: filepath.Join(t.TempDir(), name), Logger: meshtest.Logger(t).Named(name),
		}
		t.Cleanup(func() { n.Close() })
		return n
	}
	nodes := make([]*mesh.Node, 6)
	for i := range nodes {
		nodes[i] = node(fmt.Sprint("n", i))
	}
	meshtest.Up(t, nodes...)

	// A connection that is in use all the time.
	l, err := nodes[0].Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	var bg sync.WaitGroup
	defer bg.Wait()
	defer l.Close()
	bg.Go(func() {
		c, err := l.Accept()
		if err == nil {
			io.Copy(c, c)
			c.Close()
		}
	})
	dialing, cancel := context.WithTimeout(ctx, meshtest.Patience)
	defer cancel()
	c, err := nodes[1].Dial(dialing, "tcp", "n0:7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	// Changes at both replicas, all the time; who was told "done" is noted.
	var mu sync.Mutex
	done := map[string]bool{}
	stop := make(chan struct{})
	var changes sync.WaitGroup
	for i, a := range admins {
		changes.Go(func() {
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("u%d-%d", i, k)
				if _, err := a.CreateUser(ctx, name); err != nil {
					if i == 1 {
						t.Errorf("at the one that lives: %v", err)
					}
					return // killed
				}
				mu.Lock()
				done[name] = true
				mu.Unlock()
			}
		})
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(done)
	}
	meshtest.Until(t, "changes", func() bool { return count() > 20 })

	killed := time.Now()
	procs[0].Kill()
	before := count()
	for i := range 50 {
		if err := repeats(c, fmt.Sprint("word ", i)); err != nil {
			t.Fatalf("the connection broke: %v", err)
		}
	}
	meshtest.Until(t, "changes at the other", func() bool { return count() > before+20 })
	meshtest.Until(t, "all nodes to be back", func() bool {
		for _, n := range nodes {
			if n.Status().Control != "" {
				return false
			}
		}
		list, err := admins[1].Nodes(ctx)
		if err != nil {
			return false
		}
		online := 0
		for _, n := range list {
			if n.Online {
				online++
			}
		}
		return online == len(nodes)
	})
	t.Logf("all nodes back %v after the kill", time.Since(killed).Round(time.Millisecond))
	close(stop)
	changes.Wait()
	users, err := admins[1].Users(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range users {
		delete(done, u.Name)
	}
	if len(done) > 0 {
		t.Errorf("acknowledged and lost: %v", done)
	}
	if err := repeats(c, "still here"); err != nil {
		t.Fatalf("the connection broke: %v", err)
	}
	late := node("late")
	meshtest.Up(t, late)
	meshtest.Until(t, "the newcomer to reach a node from before", func() bool {
		d, cancel := context.WithTimeout(ctx, meshtest.Patience)
		defer cancel()
		p, err := late.Dial(d, "tcp", "n2:9")
		if err == nil {
			p.Close()
		}
		return true // refused by the port, by then it is reached
	})
}

// repeats sends a word and expects it back.
func repeats(c net.Conn, word string) error {
	c.SetDeadline(time.Now().Add(meshtest.Patience))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	b := make([]byte, len(word))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != word {
		return fmt.Errorf("came back as %q", b)
	}
	return nil
}
