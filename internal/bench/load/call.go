package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Ports of the services that "serve" starts.
const (
	SinkPort  = 5001
	EchoPort  = 5002
	HTTPPort  = 5003
	ShortPort = 5004 // says one byte and closes first
)

// serve starts all services of a node.
func (a *agent) serve(_ context.Context, n NodeName) (any, error) {
	node := a.node(n.Node)
	s := &sink{changed: make(chan struct{})}
	a.mu.Lock()
	a.sinks[n.Node] = s
	a.mu.Unlock()
	for port, handle := range map[int]func(net.Conn){
		SinkPort: func(c net.Conn) { s.end(take(c)) },
		EchoPort: func(c net.Conn) {
			defer c.Close()
			buf := make([]byte, 4096)
			for {
				k, err := c.Read(buf)
				if err != nil {
					return
				}
				if _, err := c.Write(buf[:k]); err != nil {
					return
				}
			}
		},
		HoldPort: hold,
		ShortPort: func(c net.Conn) {
			c.Write([]byte("x"))
			c.Close()
		},
	} {
		l, err := node.Listen(port)
		if err != nil {
			return nil, err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go handle(c)
			}
		}()
	}
	l, err := node.Listen(HTTPPort)
	if err != nil {
		return nil, err
	}
	body := bytes.Repeat([]byte("y"), 64)
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "64")
		w.Write(body)
	}))
	return nil, nil
}

// SettleArgs tell to use the path to a peer until it is as it should be.
type SettleArgs struct {
	Node, Addr string
	Relay      bool
}

func (a *agent) settle(ctx context.Context, s SettleArgs) (any, error) {
	n := a.node(s.Node)
	addr := at2(s.Addr, EchoPort)
	buf := make([]byte, 1)
	var last error
	for ctx.Err() == nil {
		last = func() error {
			try, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			c, err := n.Dial(try, addr)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			for range 20 {
				if _, err := c.Write(buf); err != nil {
					return err
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					return err
				}
			}
			if n.Direct(s.Addr) == s.Relay {
				return errors.New("it takes the wrong path")
			}
			return nil
		}()
		if last == nil {
			return nil, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, fmt.Errorf("%s to %s: %w", s.Node, s.Addr, last)
}

// at2 makes an address of host and port.
func at2(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// CountArgs tell how often to do something, with how many clients.
type CountArgs struct {
	Node, Addr string
	Count      int
	Clients    int
	Seconds    float64
}

// Times are how long some calls took, in microseconds.
type Times struct {
	Count, Failed int
	Seconds       float64 // all together
	P50, P99, Max float64
	First         string // error
}

func times(all []time.Duration, took time.Duration) Times {
	t := Times{Count: len(all), Seconds: took.Seconds()}
	if len(all) == 0 {
		return t
	}
	slices.Sort(all)
	us := func(i int) float64 { return float64(all[i].Nanoseconds()) / 1e3 }
	t.P50, t.P99, t.Max = us(len(all)/2), us(len(all)*99/100), us(len(all)-1)
	return t
}

func (a *agent) http(ctx context.Context, h CountArgs) (any, error) {
	n := a.node(h.Node)
	tr := &http.Transport{
		DialContext:         func(ctx context.Context, _, addr string) (net.Conn, error) { return n.Dial(ctx, addr) },
		MaxIdleConnsPerHost: h.Clients,
		MaxConnsPerHost:     h.Clients,
	}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: 30 * time.Second}
	url := "http://" + at2(h.Addr, HTTPPort) + "/"
	get := func() error {
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && len(b) != 64 {
			err = fmt.Errorf("%d bytes", len(b))
		}
		return err
	}
	var (
		mu    sync.Mutex // guards all, bad and first
		all   []time.Duration
		bad   int
		first string
		wg    sync.WaitGroup
	)
	if err := get(); err != nil {
		return nil, err
	}
	begin := time.Now()
	until := begin.Add(time.Duration(h.Seconds * float64(time.Second)))
	for range h.Clients {
		wg.Go(func() {
			var own []time.Duration
			for time.Now().Before(until) && ctx.Err() == nil {
				b := time.Now()
				err := get()
				if err != nil {
					mu.Lock()
					bad++
					first = err.Error()
					mu.Unlock()
					continue
				}
				own = append(own, time.Since(b))
			}
			mu.Lock()
			all = append(all, own...)
			mu.Unlock()
		})
	}
	wg.Wait()
	t := times(all, time.Since(begin))
	t.Failed, t.First = bad, first
	return t, nil
}

// pingPong sends a byte and waits for it to come back.
func (a *agent) pingPong(ctx context.Context, p CountArgs) (any, error) {
	c, err := a.node(p.Node).Dial(ctx, at2(p.Addr, EchoPort))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(Patience))
	buf := make([]byte, 1)
	var all []time.Duration
	begin := time.Now()
	for i := range p.Count {
		b := time.Now()
		buf[0] = byte(i)
		if _, err := c.Write(buf); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return nil, err
		}
		if buf[0] != byte(i) {
			return nil, errors.New("another byte came back")
		}
		all = append(all, time.Since(b))
	}
	return times(all, time.Since(begin)), nil
}

// dials opens connections one after the other, each of which the client closes.
func (a *agent) dials(ctx context.Context, d CountArgs) (any, error) {
	n, addr := a.node(d.Node), at2(d.Addr, EchoPort)
	var all []time.Duration
	begin := time.Now()
	for range d.Count {
		b := time.Now()
		c, err := n.Dial(ctx, addr)
		if err != nil {
			return nil, err
		}
		all = append(all, time.Since(b))
		c.Close()
	}
	return times(all, time.Since(begin)), nil
}

// short opens connections that the server closes first.
func (a *agent) short(ctx context.Context, d CountArgs) (any, error) {
	n, addr := a.node(d.Node), at2(d.Addr, ShortPort)
	var all []time.Duration
	bad, first := 0, ""
	begin := time.Now()
	for range d.Count {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
			defer cancel()
			b := time.Now()
			c, err := n.Dial(ctx, addr)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(3 * time.Second))
			got, err := io.ReadAll(c)
			if err == nil && string(got) != "x" {
				err = fmt.Errorf("it said %q", got)
			}
			if err == nil {
				all = append(all, time.Since(b))
			}
			return err
		}()
		if err != nil {
			if bad++; bad == 1 {
				first = err.Error()
			}
			if bad >= 20 {
				break
			}
		}
	}
	t := times(all, time.Since(begin))
	t.Failed, t.First = bad, first
	return t, nil
}
