package stock

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

type httpArgs struct {
	URL     string
	Post    int64 // bytes of Pattern to post, 0 = a GET
	Seconds int   // 0 = 30
}

// HTTPResult is what an HTTP request brought.
type HTTPResult struct {
	Status int
	Bytes  int64
	SHA256 string
	Body   string // its first 4 KiB
}

func (n *node) http(ctx context.Context, a httpArgs) (any, error) {
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.Seconds)*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", a.URL, nil)
	if a.Post > 0 {
		req, err = http.NewRequestWithContext(ctx, "POST", a.URL, io.LimitReader(Pattern(), a.Post))
	}
	if err != nil {
		return nil, err
	}
	client := n.srv.HTTPClient()
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	h := sha256.New()
	var head strings.Builder
	k, err := io.Copy(io.MultiWriter(h, &limited{&head, 4096}), resp.Body)
	if err != nil {
		return nil, err
	}
	return HTTPResult{Status: resp.StatusCode, Bytes: k, SHA256: hex.EncodeToString(h.Sum(nil)), Body: head.String()}, nil
}

// limited keeps the first bytes written to it.
type limited struct {
	w    *strings.Builder
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	k := min(len(p), l.left)
	l.w.Write(p[:k])
	l.left -= k
	return len(p), nil
}

type udpArgs struct {
	Addr  string
	Text  string
	Tries int // half seconds to wait for an answer; 0 = 20
}

// udp sends a datagram until an answer comes, and returns it.
func (n *node) udp(ctx context.Context, a udpArgs) (any, error) {
	c, err := n.srv.Dial(ctx, "udp", a.Addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	buf := make([]byte, 65536)
	for range cmp.Or(a.Tries, 20) {
		if _, err := c.Write([]byte(a.Text)); err != nil {
			return nil, err
		}
		c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		k, err := c.Read(buf)
		if err == nil {
			return string(buf[:k]), nil
		}
	}
	return nil, errors.New("no answer")
}

type openArgs struct {
	Name, Addr string
	Seconds    int // 0 = 30
}

// open dials an echo service and keeps the connection under a name.
func (n *node) open(ctx context.Context, a openArgs) (any, error) {
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	dial, cancel := context.WithTimeout(ctx, time.Duration(a.Seconds)*time.Second)
	defer cancel()
	c, err := n.srv.Dial(dial, "tcp", a.Addr)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.streams[a.Name] = c
	n.mu.Unlock()
	return nil, nil
}

func (n *node) stream(name string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.streams[name]
	if c == nil {
		return nil, fmt.Errorf("no connection %q", name)
	}
	return c, nil
}

type exchangeArgs struct {
	Name    string
	Bytes   int64 // of Pattern to send and to get back
	Seconds int   // 0 = 30
}

// exchange sends bytes over an open connection to an echo service and returns
// the SHA-256 of what came back.
func (n *node) exchange(ctx context.Context, a exchangeArgs) (any, error) {
	c, err := n.stream(a.Name)
	if err != nil {
		return nil, err
	}
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	c.SetDeadline(time.Now().Add(time.Duration(a.Seconds) * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, Pattern(), a.Bytes)
		sent <- err
	}()
	h := sha256.New()
	if _, err := io.CopyN(h, c, a.Bytes); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	if err := <-sent; err != nil {
		return nil, fmt.Errorf("write: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

type awaitArgs struct {
	Name    string
	Seconds int // 0 = 30
}

// await reads from an open connection, which nothing should come from, until it
// ends, and returns why.
func (n *node) await(_ context.Context, a awaitArgs) (any, error) {
	c, err := n.stream(a.Name)
	if err != nil {
		return nil, err
	}
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	c.SetDeadline(time.Now().Add(time.Duration(a.Seconds) * time.Second))
	k, err := c.Read(make([]byte, 1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("still open after %d seconds", a.Seconds)
	case k > 0:
		return nil, errors.New("the other end said something")
	}
	return err.Error(), nil
}

type shutArgs struct{ Name string }

func (n *node) shut(_ context.Context, a shutArgs) (any, error) {
	c, err := n.stream(a.Name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	delete(n.streams, a.Name)
	n.mu.Unlock()
	return nil, c.Close()
}
