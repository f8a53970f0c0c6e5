package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// seconds is how long one exchange may take.
const seconds = 60

// agent is a node of ours with services: HTTP on port 80, and echoes on port 7
// of TCP and UDP.
type agent struct {
	*mesh.Node
	t testing.TB
}

// startAgent starts a node of ours for the tags, as mesh's Node makes it, and
// its services.
func startAgent(t testing.TB, m *meshtest.Mesh, name string, tags []string, options ...func(*mesh.Node)) *agent {
	t.Helper()
	a := &agent{m.Node(name, tags, options...), t}
	meshtest.Up(t, a.Node)
	a.services()
	return a
}

func (a *agent) label() string { return a.Hostname }

func (a *agent) at(six bool) netip.Addr {
	for _, ip := range a.Status().Self.Addresses {
		if ip.Is6() == six {
			return ip
		}
	}
	return netip.Addr{}
}

func (a *agent) services() {
	a.t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /whois", func(w http.ResponseWriter, r *http.Request) {
		p, _ := mesh.PeerFromContext(r.Context())
		json.NewEncoder(w).Encode(identity{Name: p.Name, User: p.User, Tags: p.Tags, Caps: p.Capabilities})
	})
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		io.CopyN(w, pattern(), size)
	})
	mux.HandleFunc("POST /sum", func(w http.ResponseWriter, r *http.Request) {
		sum, err := sumFrom(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		io.WriteString(w, sum)
	})
	web := a.listen(":80")
	srv := &http.Server{ConnContext: mesh.ConnContext, Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(web) }()
	a.t.Cleanup(func() { srv.Close(); <-done })

	ln := a.listen(":7")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	pc, err := a.ListenPacket("udp", ":7")
	if err != nil {
		a.t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 65536)
		for {
			k, from, err := pc.ReadFrom(buf)
			if err != nil {
				if errors.Is(err, net.ErrClosed) || errors.Is(err, mesh.ErrRevoked) {
					return
				}
				continue // about one peer, who may not
			}
			pc.WriteTo(buf[:k], from)
		}
	}()
}

func (a *agent) listen(addr string) net.Listener {
	a.t.Helper()
	ln, err := a.Listen("tcp", addr)
	if err != nil {
		a.t.Fatal(err)
	}
	return ln
}

// peer returns what the node knows of a peer.
func (a *agent) peer(label string) (mesh.PeerStatus, bool) {
	for _, p := range a.Status().Peers {
		if p.ShortName() == label {
			return p, true
		}
	}
	return mesh.PeerStatus{}, false
}

func (a *agent) knows(label string) bool {
	p, ok := a.peer(label)
	return ok && p.Online
}

func (a *agent) pathTo(other member) string {
	p, _ := a.peer(other.label())
	return p.Path.Kind
}

func (a *agent) fetch(url string, post int64) (r httpResult, err error) {
	ctx, cancel := context.WithTimeout(a.t.Context(), seconds*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if post > 0 {
		req, err = http.NewRequestWithContext(ctx, "POST", url, io.LimitReader(pattern(), post))
	}
	if err != nil {
		return r, err
	}
	req.Close = true // a connection outlives the permission to make one
	resp, err := a.HTTPClient().Do(req)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	r.Status = resp.StatusCode
	head := make([]byte, 4096)
	k, err := io.ReadFull(resp.Body, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return r, err
	}
	r.Body = string(head[:k])
	body := &counter{r: io.MultiReader(bytes.NewReader(head[:k]), resp.Body)}
	r.SHA256, err = sumFrom(body)
	r.Bytes = body.n
	return r, err
}

func (a *agent) echo(addr string, size int64) (string, error) {
	ctx, cancel := context.WithTimeout(a.t.Context(), seconds*time.Second)
	defer cancel()
	c, err := a.Dial(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return echoOver(c, size)
}

// echoOver sends bytes of the pattern over a connection to an echo service and
// returns the sum of what came back.
func echoOver(c net.Conn, size int64) (string, error) {
	c.SetDeadline(time.Now().Add(seconds * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, pattern(), size)
		sent <- err
	}()
	sum, err := sumFrom(io.LimitReader(c, size))
	if err != nil {
		return "", fmt.Errorf("read: %w", err)
	}
	return sum, <-sent
}

func (a *agent) datagram(addr, text string, tries int) (string, error) {
	c, err := a.Dial(a.t.Context(), "udp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	buf := make([]byte, 65536)
	for range tries {
		if _, err := c.Write([]byte(text)); err != nil {
			return "", err
		}
		c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		k, err := c.Read(buf)
		if err == nil {
			return string(buf[:k]), nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return "", err
		}
	}
	return "", errors.New("no answer")
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	k, err := c.r.Read(b)
	c.n += int64(k)
	return k, err
}

// serveHTTP runs a service on one of our nodes that answers with the name of
// its caller.
func serveHTTP(t *testing.T, n *mesh.Node, port string) {
	t.Helper()
	ln, err := n.Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		ConnContext: mesh.ConnContext,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p, _ := mesh.PeerFromContext(r.Context())
			io.WriteString(w, p.ShortName())
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
}
