package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/identity"
)

// nodeTimeout is how long a node of ours may take to come up.
const nodeTimeout = 30 * time.Second

var statusCommand = &command{
	name:  "status",
	short: "describe the server on this machine, or the mesh as a node sees it",
	long: `
Without --control it describes the server of --data. If there is none, or with
--control, it comes up as a node of its own, as a user's agent would, and tells what
that node sees: itself, its peers, and how it reaches them. With MESH_STATE_DIR it is
the node of that directory; else it enrols with MESH_AUTHKEY as an ephemeral node,
which uses up a key that is good for one node.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		data := dataFlag(fs)
		asJSON := jsonFlag(fs)
		control := fs.String("control", "", "join as a node at `URL` (default $MESH_CONTROL_URL)")
		return func(ctx context.Context, c *call) error {
			if *control == "" {
				err := serverStatus(ctx, c, *data, *asJSON)
				if !errors.Is(err, errNoServer) || os.Getenv("MESH_CONTROL_URL") == "" {
					return err
				}
			} else if *data != "" {
				return usageError{"--data means a server, --control a node: give one of the two"}
			}
			return nodeStatus(ctx, c, *control, *asJSON)
		}
	},
}

// errNoServer is an error whose text is that of what it wraps.
var errNoServer = errors.New("no server")

type noServer struct{ error }

func (e noServer) Is(target error) bool { return target == errNoServer }
func (e noServer) Unwrap() error        { return e.error }

// serverStatus describes the server that a --data flag means. It fails with
// errNoServer if none answers.
func serverStatus(ctx context.Context, c *call, data string, asJSON bool) error {
	dir, err := dataDir(data)
	if err != nil {
		return noServer{err}
	}
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	s := admin.NewClient(filepath.Join(dir, host.SocketName))
	st, err := s.Status(ctx)
	var refused *admin.Error
	if err != nil && !errors.As(err, &refused) {
		return noServer{err}
	}
	if err != nil {
		return err
	}
	relays, err := s.Relays(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return c.writeJSON(struct {
			admin.Status
			RelayMap []admin.Relay `json:"relayMap"`
		}{st, relays})
	}
	policy := fmt.Sprintf("version %d", st.PolicyVersion)
	if st.DenyAll {
		policy = "none: nobody may reach anybody"
	}
	nodes := fmt.Sprintf("%d, %d online", st.Nodes, st.Online)
	if st.Pending > 0 {
		nodes += fmt.Sprintf(", %d more to be let in (mesh node pending)", st.Pending)
	}
	writeFields(c, [][2]string{
		{"url", st.URL},
		{"key", st.Key.String()},
		{"domain", st.Domain},
		{"policy", policy},
		{"users", strconv.Itoa(st.Users)},
		{"nodes", nodes},
	})
	if len(relays) == 0 {
		c.printf("\nno relay: nodes that cannot reach each other directly have no path\n")
		return nil
	}
	c.printf("\n")
	writeRelays(c, relays)
	return nil
}

// nodeReport is the JSON form of a node's status.
type nodeReport struct {
	Self          peerReport   `json:"self"`
	Control       string       `json:"control,omitempty"` // what is wrong with it
	PolicyVersion int64        `json:"policyVersion"`
	HomeRelay     int          `json:"homeRelay,omitempty"`
	Peers         []peerReport `json:"peers"`
}

type peerReport struct {
	ID        identity.StableID `json:"id"`
	Name      string            `json:"name"`
	Addresses []string          `json:"addresses"`
	User      string            `json:"user,omitempty"`
	Tags      []string          `json:"tags,omitempty"`
	Online    bool              `json:"online"`
	LastSeen  time.Time         `json:"lastSeen,omitzero"`
	Path      string            `json:"path,omitempty"` // "direct" or "relay"
	Endpoint  string            `json:"endpoint,omitempty"`
	Relay     int               `json:"relay,omitempty"`
	LatencyMS float64           `json:"latencyMilliseconds,omitempty"`
}

func reportPeer(p identity.Peer) peerReport {
	r := peerReport{ID: p.ID, Name: p.Name, User: p.User, Tags: p.Tags, Addresses: []string{}}
	for _, a := range p.Addresses {
		r.Addresses = append(r.Addresses, a.String())
	}
	return r
}

// nodeStatus comes up as a node and tells what it sees.
func nodeStatus(ctx context.Context, c *call, control string, asJSON bool) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	n := &mesh.Node{ControlURL: control, Hostname: os.Getenv("MESH_HOSTNAME")}
	if os.Getenv("MESH_STATE_DIR") == "" {
		if os.Getenv("MESH_AUTHKEY") == "" {
			return errors.New("to join as a node, set MESH_AUTHKEY to an enrolment key, or MESH_STATE_DIR to the state of a node that is not running")
		}
		n.Ephemeral = true
		if n.Hostname == "" {
			n.Hostname = "mesh-status"
		}
	}
	defer n.Close()
	st, err := n.Up(ctx)
	if err != nil {
		return err
	}
	report := nodeReport{Self: reportPeer(st.Self), Control: st.Control, PolicyVersion: st.PolicyVersion, HomeRelay: st.HomeRelay, Peers: []peerReport{}}
	report.Self.Online = st.Running && st.Control == ""
	for _, p := range st.Peers {
		r := reportPeer(p.Peer)
		r.Online, r.LastSeen, r.Path, r.Relay = p.Online, p.LastSeen, p.Path, p.Relay
		if p.Endpoint.IsValid() {
			r.Endpoint = p.Endpoint.String()
		}
		r.LatencyMS = float64(p.Latency.Microseconds()) / 1000
		report.Peers = append(report.Peers, r)
	}
	if asJSON {
		return c.writeJSON(report)
	}
	writeNode(c, report)
	return nil
}

func writeNode(c *call, r nodeReport) {
	control := r.Control
	if control == "" {
		control = "connected"
	}
	relay := "none"
	if r.HomeRelay != 0 {
		relay = fmt.Sprintf("region %d", r.HomeRelay)
	}
	address := ""
	if len(r.Self.Addresses) > 0 {
		address = r.Self.Addresses[0]
	}
	writeFields(c, [][2]string{
		{"name", r.Self.Name},
		{"owner", owner(r.Self.User, r.Self.Tags)},
		{"address", address},
		{"control", control},
		{"policy", fmt.Sprintf("version %d", r.PolicyVersion)},
		{"home relay", relay},
	})
	if len(r.Peers) == 0 {
		c.printf("\nno peers: the policy lets this node see nobody\n")
		return
	}
	c.printf("\n")
	now := time.Now()
	t := newTable(c.stdout, "PEER", "ADDRESS", "OWNER", "SEEN", "PATH")
	for _, p := range r.Peers {
		seen := "online"
		if !p.Online {
			seen = "offline, seen " + ago(p.LastSeen, now)
		}
		path := "idle"
		switch p.Path {
		case "direct":
			path = "direct " + p.Endpoint
		case "relay":
			path = fmt.Sprintf("relay %d", p.Relay)
		}
		address := ""
		if len(p.Addresses) > 0 {
			address = p.Addresses[0]
		}
		t.row(p.Name, address, owner(p.User, p.Tags), seen, path)
	}
	t.flush()
}
