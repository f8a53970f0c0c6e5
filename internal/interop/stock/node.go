package stock

import (
	"context"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
)

// node is one stock node.
type node struct {
	srv *tsnet.Server
	lc  *local.Client // set by up

	mu      sync.Mutex
	streams map[string]net.Conn // guarded by mu; by the name a test gave
	closers []io.Closer         // guarded by mu; listeners
}

func newNode(args []string) (map[string]handler, func()) {
	n := &node{srv: new(tsnet.Server), streams: make(map[string]net.Conn)}
	fs := flag.NewFlagSet("node", flag.ExitOnError)
	fs.StringVar(&n.srv.Hostname, "hostname", "", "name to ask for")
	fs.StringVar(&n.srv.Dir, "dir", "", "state directory")
	fs.StringVar(&n.srv.ControlURL, "control", "", "control server")
	fs.StringVar(&n.srv.AuthKey, "authkey", "", "enrolment key")
	fs.BoolVar(&n.srv.Ephemeral, "ephemeral", false, "forget the node when it leaves")
	tags := fs.String("tags", "", "tags to ask for, with commas")
	port := fs.Uint("port", 0, "UDP port")
	fs.Parse(args)
	n.srv.Port = uint16(*port)
	if *tags != "" {
		n.srv.AdvertiseTags = strings.Split(*tags, ",")
	}
	n.srv.Logf = log.New(os.Stderr, "", log.Lmicroseconds).Printf
	n.srv.UserLogf = n.srv.Logf
	return map[string]handler{
		"start":    typed(n.start),
		"up":       typed(n.up),
		"status":   typed(n.status),
		"whois":    typed(n.whois),
		"ping":     typed(n.ping),
		"logout":   typed(n.logout),
		"login":    typed(n.login),
		"shields":  typed(n.shields),
		"run":      typed(n.run),
		"serve":    typed(n.serve),
		"http":     typed(n.http),
		"udp":      typed(n.udp),
		"open":     typed(n.open),
		"exchange": typed(n.exchange),
		"await":    typed(n.await),
		"shut":     typed(n.shut),
	}, n.close
}

func (n *node) close() {
	n.mu.Lock()
	for _, c := range n.closers {
		c.Close()
	}
	for _, c := range n.streams {
		c.Close()
	}
	n.mu.Unlock()
	n.srv.Close()
}

type none struct{}

// start starts the node without waiting, and tells states and login URLs as
// events "state" and "login".
func (n *node) start(ctx context.Context, _ none) (any, error) {
	if err := n.srv.Start(); err != nil {
		return nil, err
	}
	lc, err := n.srv.LocalClient()
	if err != nil {
		return nil, err
	}
	n.lc = lc
	w, err := lc.WatchIPNBus(ctx, ipn.NotifyInitialState)
	if err != nil {
		return nil, err
	}
	go func() {
		defer w.Close()
		for {
			m, err := w.Next()
			if err != nil {
				return
			}
			if m.State != nil {
				event("state", m.State.String())
			}
			if m.BrowseToURL != nil && *m.BrowseToURL != "" {
				event("login", *m.BrowseToURL)
			}
		}
	}()
	return nil, nil
}

// up waits until the node runs and returns its status.
func (n *node) up(ctx context.Context, _ none) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	st, err := n.srv.Up(ctx)
	if err != nil {
		return nil, err
	}
	if n.lc == nil {
		if n.lc, err = n.srv.LocalClient(); err != nil {
			return nil, err
		}
	}
	return st, nil
}

func (n *node) status(ctx context.Context, _ none) (any, error) { return n.lc.Status(ctx) }

type whoisArgs struct{ Addr string }

func (n *node) whois(ctx context.Context, a whoisArgs) (any, error) {
	w, err := n.lc.WhoIs(ctx, a.Addr)
	if err != nil {
		return nil, err
	}
	return identityOf(w.Node, w.UserProfile, w.CapMap), nil
}

// Identity is what a stock node says of a peer.
type Identity struct {
	Name  string
	User  string
	Tags  []string
	Caps  map[string][]json.RawMessage
	Addrs []netip.Prefix
}

func identityOf(n *tailcfg.Node, u *tailcfg.UserProfile, caps tailcfg.PeerCapMap) Identity {
	id := Identity{Name: n.Name, Tags: n.Tags, Addrs: n.Addresses, Caps: make(map[string][]json.RawMessage)}
	if u != nil {
		id.User = u.LoginName
	}
	for c, values := range caps {
		id.Caps[string(c)] = []json.RawMessage{}
		for _, v := range values {
			id.Caps[string(c)] = append(id.Caps[string(c)], json.RawMessage(v))
		}
	}
	return id
}

type pingArgs struct {
	Addr string
	Type string // "disco", "TSMP", "ICMP"
}

func (n *node) ping(ctx context.Context, a pingArgs) (any, error) {
	ip, err := netip.ParseAddr(a.Addr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return n.lc.Ping(ctx, ip, tailcfg.PingType(a.Type))
}

func (n *node) logout(ctx context.Context, _ none) (any, error) { return nil, n.lc.Logout(ctx) }

type loginArgs struct{ AuthKey string }

// login logs in again, which makes another node key: with an enrolment key, or
// by a URL that comes as an event.
func (n *node) login(ctx context.Context, a loginArgs) (any, error) {
	// A logout has forgotten everything, also the control server.
	prefs, err := n.lc.GetPrefs(ctx)
	if err != nil {
		return nil, err
	}
	prefs.ControlURL, prefs.Hostname, prefs.WantRunning = n.srv.ControlURL, n.srv.Hostname, true
	if err := n.lc.Start(ctx, ipn.Options{AuthKey: a.AuthKey, UpdatePrefs: prefs}); err != nil {
		return nil, err
	}
	return nil, n.lc.StartLoginInteractive(ctx)
}

type onOff struct{ On bool }

// shields lets nobody begin a connection to the node, or everybody whom the
// policy lets.
func (n *node) shields(ctx context.Context, a onOff) (any, error) {
	_, err := n.lc.EditPrefs(ctx, &ipn.MaskedPrefs{Prefs: ipn.Prefs{ShieldsUp: a.On}, ShieldsUpSet: true})
	return nil, err
}

// run disconnects the node from the mesh, or connects it again.
func (n *node) run(ctx context.Context, a onOff) (any, error) {
	_, err := n.lc.EditPrefs(ctx, &ipn.MaskedPrefs{Prefs: ipn.Prefs{WantRunning: a.On}, WantRunningSet: true})
	return nil, err
}
