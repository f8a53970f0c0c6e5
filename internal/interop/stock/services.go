package stock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
)

type serveArgs struct {
	Kind string // "http", "echo" (TCP), "udp" (echo)
	Port int
}

// serve starts a service on the node's mesh addresses. The HTTP service
// answers /whois with the Identity of its caller, /bytes?n=N with N bytes of
// Pattern, and POST /sum with the SHA-256 of what it got.
func (n *node) serve(ctx context.Context, a serveArgs) (any, error) {
	if a.Kind == "udp" {
		st, err := n.lc.Status(ctx)
		if err != nil {
			return nil, err
		}
		for _, ip := range st.TailscaleIPs {
			pc, err := n.srv.ListenPacket("udp", net.JoinHostPort(ip.String(), strconv.Itoa(a.Port)))
			if err != nil {
				return nil, err
			}
			n.keep(pc)
			go echoPackets(pc)
		}
		return nil, nil
	}
	ln, err := n.srv.Listen("tcp", ":"+strconv.Itoa(a.Port))
	if err != nil {
		return nil, err
	}
	n.keep(ln)
	if a.Kind == "http" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /whois", func(w http.ResponseWriter, r *http.Request) {
			who, err := n.lc.WhoIs(r.Context(), r.RemoteAddr)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			json.NewEncoder(w).Encode(identityOf(who.Node, who.UserProfile, who.CapMap))
		})
		mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
			size, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
			io.CopyN(w, Pattern(), size)
		})
		mux.HandleFunc("POST /sum", func(w http.ResponseWriter, r *http.Request) {
			h := sha256.New()
			if _, err := io.Copy(h, r.Body); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			fmt.Fprint(w, hex.EncodeToString(h.Sum(nil)))
		})
		go http.Serve(ln, mux)
		return nil, nil
	}
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
	return nil, nil
}

func echoPackets(pc net.PacketConn) {
	buf := make([]byte, 65536)
	for {
		k, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		pc.WriteTo(buf[:k], from)
	}
}

func (n *node) keep(c io.Closer) {
	n.mu.Lock()
	n.closers = append(n.closers, c)
	n.mu.Unlock()
}
