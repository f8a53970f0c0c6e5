package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"mesh"
)

// callTimeout bounds one call.
const callTimeout = 10 * time.Second

// agent is one of the three agents: a node of the mesh, in a process of its own.
type agent struct {
	node   *mesh.Node
	events *reporter // tells the parent process what happens

	mu   sync.Mutex // guards open
	open map[string]*heldConn
}

// runAgent is what an agent does. The Node's fields are empty: the library takes
// everything from MESH_CONTROL_URL, MESH_AUTHKEY and the like.
func runAgent(ctx context.Context, role string, orders <-chan order, events *reporter) error {
	node := new(mesh.Node)
	defer node.Close()

	// Up enrols and waits until peers can reach us. Listen and Dial would do that
	// by themselves; here the parent wants to know first who we are.
	status, err := node.Up(ctx)
	if err != nil {
		return err
	}
	a := &agent{node: node, events: events, open: map[string]*heldConn{}}
	switch role {
	case "database":
		err = errors.Join(a.answer(":5432", "1 row: 42"), a.answer(":9187", "1729"))
	case "image":
		err = a.serveHTTP(":8080")
	}
	if err != nil {
		return err
	}
	self := status.Self
	events.send(event{Event: evReady, Peer: self.Name, Tags: self.Tags, Addr: self.Addresses[0].String()})
	for o := range orders {
		events.send(a.obey(ctx, o))
	}
	return nil
}

// answer listens on the mesh and answers each line with the same text. Listening
// opens nothing on this machine: only peers that the policy lets in can connect.
func (a *agent) answer(addr, text string) error {
	l, err := a.node.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the node is closed or was thrown out
			}
			go a.converse(c, text)
		}
	}()
	return nil
}

// converse serves one connection.
func (a *agent) converse(c net.Conn, text string) {
	defer c.Close()
	// Who is calling was proven by its key before the first byte arrived.
	peer, _ := mesh.PeerOf(c)
	a.events.send(event{Event: evServed, Peer: peer.Name, Tags: peer.Tags, Addr: peer.Addresses[0].String(), Rule: peer.Rule.String()})
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		if _, err := fmt.Fprintln(c, text); err != nil {
			break
		}
	}
	if err := lines.Err(); err != nil {
		a.events.send(event{Event: evEnded, Error: err.Error(), Kind: kindOf(err)})
	}
}

// serveHTTP shows that net/http works as it does anywhere; ConnContext brings
// the caller's identity into each request.
func (a *agent) serveHTTP(addr string) error {
	l, err := a.node.Listen("tcp", addr)
	if err != nil {
		return err
	}
	s := &http.Server{
		ConnContext:       mesh.ConnContext,
		ReadHeaderTimeout: callTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			peer, _ := mesh.PeerFromContext(r.Context())
			a.events.send(event{Event: evServed, Peer: peer.Name, Tags: peer.Tags, Addr: peer.Addresses[0].String(), Rule: peer.Rule.String()})
			fmt.Fprintf(w, "a picture for %s", peer.ShortName())
		}),
	}
	go s.Serve(l)
	return nil
}

// obey does what the parent asks for and tells how it went.
func (a *agent) obey(ctx context.Context, o order) event {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	start := time.Now()
	var text string
	var err error
	switch o.Do {
	case doAsk:
		text, err = a.ask(ctx, o.Addr, o.Say)
	case doGet:
		text, err = a.get(ctx, "http://"+o.Addr+o.Say)
	case doOpen:
		err = a.hold(ctx, o.Conn, o.Addr)
	case doSay:
		text, err = a.say(ctx, o.Conn, o.Say)
	}
	r := event{Event: evResult, Answer: text, Took: time.Since(start), Path: a.pathTo(o.Addr)}
	if err != nil {
		r.Error, r.Kind = err.Error(), kindOf(err)
	}
	return r
}

// ask makes a connection, sends a line and reads the answer.
func (a *agent) ask(ctx context.Context, addr, line string) (string, error) {
	c, err := a.node.Dial(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		c.SetDeadline(d)
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	text, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(text), err
}

// get asks a peer over HTTP. The client dials peers and nobody else.
func (a *agent) get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return "", err
	}
	req.Close = true // each call of the story is a connection of its own
	resp, err := a.node.HTTPClient().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return string(body), err
}

// heldConn is a connection that stays open between orders.
type heldConn struct {
	net.Conn
	lines chan string // what the other end says
}

// hold opens a connection and reports when it ends.
func (a *agent) hold(ctx context.Context, name, addr string) error {
	c, err := a.node.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	h := &heldConn{Conn: c, lines: make(chan string, 1)}
	a.mu.Lock()
	a.open[name] = h
	a.mu.Unlock()
	go func() {
		defer c.Close()
		defer close(h.lines)
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			h.lines <- lines.Text()
		}
		err := lines.Err()
		if err == nil {
			err = io.EOF
		}
		a.events.send(event{Event: evEnded, Error: err.Error(), Kind: kindOf(err)})
	}()
	return nil
}

// say uses a connection that hold opened.
func (a *agent) say(ctx context.Context, name, line string) (string, error) {
	a.mu.Lock()
	h := a.open[name]
	a.mu.Unlock()
	if h == nil {
		return "", fmt.Errorf("no connection %q", name)
	}
	if _, err := fmt.Fprintln(h, line); err != nil {
		return "", err
	}
	select {
	case text, ok := <-h.lines:
		if !ok {
			return "", io.ErrUnexpectedEOF
		}
		return text, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// pathTo tells how packets to the peer in addr travel.
func (a *agent) pathTo(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	for _, p := range a.node.Status().Peers {
		if p.ShortName() != host {
			continue
		}
		switch p.Path.Kind {
		case "direct":
			return "direct by UDP " + p.Path.Endpoint.String()
		case "relay":
			return fmt.Sprintf("relayed by region %d", p.Path.Relay)
		}
	}
	return ""
}

// Kinds of failures, in the words of the story.
const (
	kindDenied  = "refused"
	kindRevoked = "revoked"
	kindReset   = "reset"
	kindUnknown = "unknown"
	kindOther   = "failed"
)

// kindOf shows which errors a caller can tell apart.
func kindOf(err error) string {
	switch {
	case errors.Is(err, mesh.ErrDenied):
		return kindDenied
	case errors.Is(err, mesh.ErrRevoked):
		return kindRevoked
	case errors.Is(err, syscall.ECONNRESET):
		return kindReset
	case errors.Is(err, mesh.ErrUnknownHost):
		return kindUnknown
	}
	return kindOther
}
