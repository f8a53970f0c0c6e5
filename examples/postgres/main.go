// Postgres puts a real PostgreSQL server on a mesh, as it is, and uses it from
// another agent through an ordinary client library:
//
//	go run ./examples/postgres
//
// The server listens on a unix socket only. The database agent listens on the mesh
// and passes connections on, after the mesh has proven who is calling and the
// policy has let them in; that is all the access control there is. The app agent
// dials through Node.Dial. A monitor agent, which may read metrics but not
// query, is refused.
//
// It needs the server's programs (initdb, postgres), on PATH or where Debian's
// package postgresql puts them. Exit status 0 says that all went as it must.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/pgserver"
)

const policy = `{
	"tagOwners": {"tag:app": [], "tag:monitor": [], "tag:database": []},
	"acls": [
		{"action": "accept", "src": ["tag:app"], "dst": ["tag:database:5432"]},
		{"action": "accept", "src": ["tag:monitor"], "dst": ["tag:database:9187"]},
	],
}
`

// patience is how long all of it may take.
const patience = 2 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	ctx, cancel := context.WithTimeout(ctx, patience)
	err := run(ctx)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "postgres example:", err)
		os.Exit(1)
	}
	fmt.Println("\nAll went as it must.")
}

func run(ctx context.Context) error {
	bin, err := pgserver.Find()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mesh")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	pg, err := pgserver.Start(ctx, bin, filepath.Join(dir, "pg"))
	if err != nil {
		return err
	}
	defer pg.Stop()
	say("server", "%s, on a unix socket only", pg.Version)

	control, err := host.Start(host.Config{DataDir: filepath.Join(dir, "control"), Listen: "127.0.0.1:0", STUN: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	defer control.Close()
	operator := admin.NewClient(control.Socket())
	if _, err := operator.SetPolicy(ctx, admin.PolicySet{Text: policy}); err != nil {
		return err
	}

	nodes := map[string]*mesh.Node{}
	for _, name := range []string{"database", "app", "monitor"} {
		key, err := operator.CreateKey(ctx, admin.KeyCreate{Tags: []string{"tag:" + name}})
		if err != nil {
			return err
		}
		n := &mesh.Node{
			Hostname:   name,
			ControlURL: control.URL(),
			ControlKey: control.Key().String(),
			AuthKey:    key.Secret,
			Dir:        filepath.Join(dir, name),
		}
		defer n.Close()
		st, err := n.Up(ctx)
		if err != nil {
			return err
		}
		nodes[name] = n
		say("agent", "%s at %s", st.Self, st.Self.Addresses[0])
	}

	l, err := nodes["database"].Listen("tcp", ":5432")
	if err != nil {
		return err
	}
	door := open(l, pg.Socket)
	defer door.close()
	// From here on nobody knows of the unix socket any more.

	if err := use(ctx, nodes["app"]); err != nil {
		return fmt.Errorf("app: %w", err)
	}
	for _, who := range door.callers() {
		say("admitted", "%d connections of %s by %s", who.connections, who.peer, who.peer.Rule)
	}

	start := time.Now()
	c, err := connect(ctx, nodes["monitor"])
	if err == nil {
		c.Close(ctx)
		return errors.New("monitor: connected, which the policy does not allow")
	}
	var denied *mesh.DeniedError
	if !errors.As(err, &denied) {
		return fmt.Errorf("monitor: want to be denied, got: %w", err)
	}
	say("refused", "monitor, after %.1f ms: %s", millis(time.Since(start)), denied)
	return nil
}

func say(what, format string, args ...any) {
	fmt.Printf("%-10s %s\n", what, fmt.Sprintf(format, args...))
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
