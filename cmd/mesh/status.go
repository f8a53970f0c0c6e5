package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/identity"
)

// nodeTimeout is how long a node of ours may take to come up.
const nodeTimeout = 30 * time.Second

// `mesh status --ping` looks for direct paths for askTime, and asks each peer that
// often.
const (
	askTime  = 3 * time.Second
	askEvery = 200 * time.Millisecond
)

var statusCommand = &command{
	name:  "status",
	short: "describe the server on this machine, or the mesh as a node sees it",
	long: `
Without --control it describes the server of --data. If there is none, or with
--control, it comes up as a node of its own, as a user's agent would, and tells what
that node sees: itself, its peers, and how it reaches them. That it knows of peers with
traffic only: with --ping it asks all that are online first. With MESH_STATE_DIR it
is the node of that directory; else it enrols with MESH_AUTHKEY as an ephemeral node,
which uses up a key that is good for one node.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		data := dataFlag(fs)
		asJSON := jsonFlag(fs)
		control := fs.String("control", "", "join as a node at `URL` (default $MESH_CONTROL_URL)")
		ping := fs.Bool("ping", false, "as a node, find the paths to the peers that are online first")
		return func(ctx context.Context, c *call) error {
			if *ping && *data != "" {
				return usageError{"--data means a server, --ping a node: give one of the two"}
			}
			if *control == "" && !*ping {
				err := serverStatus(ctx, c, *data, *asJSON)
				if !errors.Is(err, errNoServer) || os.Getenv("MESH_CONTROL_URL") == "" {
					return err
				}
			} else if *control != "" && *data != "" {
				return usageError{"--data means a server, --control a node: give one of the two"}
			}
			return nodeStatus(ctx, c, *control, *ping, *asJSON)
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
	KeyExpiry     time.Time    `json:"keyExpiry,omitzero"`  // zero = never
	KeyRenewal    time.Time    `json:"keyRenewal,omitzero"` // by the node itself; zero = it cannot
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
	pathReport
}

// pathReport is the JSON form of a way to a peer.
type pathReport struct {
	Path      string    `json:"path,omitempty"` // "direct" or "relay"
	Endpoint  string    `json:"endpoint,omitempty"`
	Relay     int       `json:"relay,omitempty"`
	LatencyMS float64   `json:"latencyMilliseconds,omitempty"` // of a round trip
	Since     time.Time `json:"pathSince,omitzero"`
	Why       string    `json:"pathReason,omitempty"`
}

func reportPath(p mesh.Path) pathReport {
	r := pathReport{Path: p.Kind, Relay: p.Relay, LatencyMS: float64(p.Latency.Microseconds()) / 1000, Since: p.Since, Why: p.Why}
	if p.Endpoint.IsValid() {
		r.Endpoint = p.Endpoint.String()
	}
	return r
}

// latency is the time of a round trip for people, "" if it is not known.
func (p pathReport) latency() string {
	switch {
	case p.LatencyMS == 0:
		return ""
	case p.LatencyMS < 10:
		return fmt.Sprintf("%.1f ms", p.LatencyMS)
	}
	return fmt.Sprintf("%.0f ms", p.LatencyMS)
}

func reportPeer(p identity.Peer) peerReport {
	r := peerReport{ID: p.ID, Name: p.Name, User: p.User, Tags: p.Tags, Addresses: []string{}}
	for _, a := range p.Addresses {
		r.Addresses = append(r.Addresses, a.String())
	}
	return r
}

// comeUp starts a node as the environment says, with that name unless it says
// another. The caller closes it.
func comeUp(ctx context.Context, control, name string) (*mesh.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	n := &mesh.Node{ControlURL: control, Hostname: os.Getenv("MESH_HOSTNAME")}
	if os.Getenv("MESH_STATE_DIR") == "" {
		if os.Getenv("MESH_AUTHKEY") == "" {
			return nil, errors.New("to join as a node, set MESH_AUTHKEY to an enrolment key, or MESH_STATE_DIR to the state of a node that is not running")
		}
		n.Ephemeral = true
		if n.Hostname == "" {
			n.Hostname = name
		}
	}
	if _, err := n.Up(ctx); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// askAll pings the peers of a node that are online, so that it knows paths to
// them.
func askAll(ctx context.Context, n *mesh.Node) {
	const atOnce = 16
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for _, p := range n.Status().Peers {
		if !p.Online || p.Expired {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			for direct := false; !direct && ctx.Err() == nil; {
				err := n.Ping(ctx, p.Name, func(g mesh.Pong) { direct = direct || g.Kind == "direct" })
				if err != nil {
					return // the table says that there is no path
				}
				select {
				case <-time.After(askEvery):
				case <-ctx.Done():
				}
			}
		})
	}
	wg.Wait()
}

// nodeStatus comes up as a node and tells what it sees.
func nodeStatus(ctx context.Context, c *call, control string, ping, asJSON bool) error {
	n, err := comeUp(ctx, control, "mesh-status")
	if err != nil {
		return err
	}
	defer n.Close()
	if ping {
		within, cancel := context.WithTimeout(ctx, askTime)
		askAll(within, n)
		cancel()
	}
	st := n.Status()
	report := nodeReport{Self: reportPeer(st.Self), Control: st.Control, PolicyVersion: st.PolicyVersion, HomeRelay: st.HomeRelay, KeyExpiry: st.KeyExpiry, KeyRenewal: st.KeyRenewal, Peers: []peerReport{}}
	report.Self.Online = st.Running && st.Control == ""
	for _, p := range st.Peers {
		r := reportPeer(p.Peer)
		r.Online, r.LastSeen, r.pathReport = p.Online, p.LastSeen, reportPath(p.Path)
		report.Peers = append(report.Peers, r)
	}
	if asJSON {
		return c.writeJSON(report)
	}
	writeNode(c, report)
	return nil
}

// ownKey tells until when the node's key is good, and who has to do something
// about it.
func ownKey(r nodeReport, now time.Time) string {
	switch {
	case r.KeyExpiry.IsZero():
		return "does not expire"
	case r.KeyRenewal.IsZero():
		return "expires " + ago(r.KeyExpiry, now) + ": log in then, or have an auth key"
	}
	return "expires " + ago(r.KeyExpiry, now) + ", renewed before"
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
		{"node key", ownKey(r, time.Now())},
	})
	if len(r.Peers) == 0 {
		c.printf("\nno peers: the policy lets this node see nobody\n")
		return
	}
	c.printf("\n")
	now := time.Now()
	t := newTable(c.stdout, "PEER", "ADDRESS", "OWNER", "SEEN", "PATH", "ROUND TRIP", "SINCE")
	for _, p := range r.Peers {
		seen := "online"
		if !p.Online {
			seen = "offline, seen " + ago(p.LastSeen, now)
		}
		path, since := "idle", ""
		switch p.Path {
		case "direct":
			path = "direct " + p.Endpoint
		case "relay":
			path = fmt.Sprintf("relay %d", p.Relay)
		}
		switch {
		case p.Path == "":
		case p.Since.IsZero():
			since = p.Why
		default:
			since = ago(p.Since, now) + ", " + p.Why
		}
		address := ""
		if len(p.Addresses) > 0 {
			address = p.Addresses[0]
		}
		t.row(p.Name, address, owner(p.User, p.Tags), seen, path, p.latency(), since)
	}
	t.flush()
}
