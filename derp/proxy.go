package derp

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"
)

// ErrProxy reports that a proxy could not be used or refused the connection.
var ErrProxy = errors.New("proxy")

// ProxyFromEnvironment returns the proxy by which to reach host:port as the
// variables HTTPS_PROXY, ALL_PROXY and NO_PROXY (or the same in lower case, which
// go first) say, nil for none. It reads them anew at each call. Loopback
// addresses are always reached directly.
func ProxyFromEnvironment(addr string) (*url.URL, error) { return proxyFrom(os.Getenv, addr) }

// proxyFrom is ProxyFromEnvironment for any environment.
func proxyFrom(getenv func(string) string, addr string) (*url.URL, error) {
	get := func(name string) string {
		if v := getenv(strings.ToLower(name)); v != "" {
			return v
		}
		return getenv(name)
	}
	text, name := get("HTTPS_PROXY"), "HTTPS_PROXY"
	if text == "" {
		text, name = get("ALL_PROXY"), "ALL_PROXY"
	}
	host, port, err := net.SplitHostPort(addr)
	if text == "" || err != nil || bypasses(get("NO_PROXY"), host, port) {
		return nil, nil
	}
	if !strings.Contains(text, "://") {
		text = "http://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" {
		return nil, fmt.Errorf("%w: %s is not the address of one", ErrProxy, name) // its text may hold a password
	}
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
		return u, nil
	}
	return nil, fmt.Errorf("%w: %s has the scheme %q; http, https and socks5 are known", ErrProxy, name, u.Scheme)
}

// bypasses reports whether a NO_PROXY list exempts a host: by "*", its name, a
// domain above it, its address or a prefix of it, each with a port or without.
func bypasses(list, host, port string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	ip, err := netip.ParseAddr(host)
	isIP := err == nil
	ip = ip.Unmap()
	if host == "localhost" || isIP && ip.IsLoopback() {
		return true
	}
	for _, e := range strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' }) {
		e = strings.ToLower(e)
		if e == "*" {
			return true
		}
		if pfx, err := netip.ParsePrefix(e); err == nil {
			if isIP && pfx.Contains(ip) {
				return true
			}
			continue
		}
		if h, p, err := net.SplitHostPort(e); err == nil {
			if p != port {
				continue
			}
			e = h
		}
		if a, err := netip.ParseAddr(strings.Trim(e, "[]")); err == nil {
			if isIP && a.Unmap() == ip {
				return true
			}
			continue
		}
		e = strings.TrimPrefix(e, "*")
		bare := strings.TrimPrefix(e, ".")
		if !isIP && bare != "" && (host == bare || strings.HasSuffix(host, "."+bare)) {
			return true
		}
	}
	return false
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// dialVia connects to addr through a proxy. The proxy resolves names.
func dialVia(ctx context.Context, dial dialFunc, proxy *url.URL, addr string, connect time.Duration) (net.Conn, error) {
	fail := func(err error) error {
		// The host alone: the rest may hold a password.
		return fmt.Errorf("%w %s: %w", ErrProxy, proxy.Host, err)
	}
	port := proxy.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[proxy.Scheme]
		if port == "" {
			port = "1080"
		}
	}
	cctx, cancel := context.WithTimeout(ctx, connect)
	nc, err := dial(cctx, "tcp", net.JoinHostPort(proxy.Hostname(), port))
	cancel()
	if err != nil {
		return nil, fail(err)
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn := nc
	if proxy.Scheme == "https" {
		tc := tls.Client(nc, &tls.Config{ServerName: proxy.Hostname(), MinVersion: tls.VersionTLS12})
		if err = tc.HandshakeContext(ctx); err == nil {
			conn = tc
		}
	}
	if err == nil {
		if strings.HasPrefix(proxy.Scheme, "socks5") {
			err = socksConnect(conn, proxy.User, addr)
		} else {
			err = httpConnect(conn, proxy.User, addr)
		}
	}
	if err == nil && !stop() {
		err = ctx.Err() // its deadline sits on the socket
	}
	if err != nil {
		nc.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fail(err)
	}
	return conn, nil
}

// httpConnect asks an HTTP proxy for a tunnel.
func httpConnect(nc net.Conn, user *url.Userinfo, addr string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", addr, addr)
	if user != nil {
		pw, _ := user.Password()
		token := base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + pw))
		fmt.Fprintf(&b, "Proxy-Authorization: Basic %s\r\n", token)
	}
	b.WriteString("\r\n")
	if _, err := io.WriteString(nc, b.String()); err != nil {
		return err
	}
	// Byte by byte, so that nothing of what comes behind is swallowed. The
	// relay speaks second, hence nothing should.
	r := bufio.NewReader(io.LimitReader(oneByte{nc}, maxResponse))
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answers %q", resp.Status)
	}
	return nil
}

// oneByte reads no more than asked for.
type oneByte struct{ r io.Reader }

func (o oneByte) Read(b []byte) (int, error) { return o.r.Read(b[:min(len(b), 1)]) }

// The parts of SOCKS version 5 (RFC 1928, RFC 1929) that connecting needs.
const (
	socksVersion  = 5
	socksNoAuth   = 0
	socksPassword = 2
	socksConnectC = 1
	socksIPv4     = 1
	socksName     = 3
	socksIPv6     = 4
)

var socksErrors = [...]string{
	1: "general failure", 2: "connection not allowed", 3: "network unreachable", 4: "host unreachable",
	5: "connection refused", 6: "too many hops", 7: "command not supported", 8: "address type not supported",
}

// socksConnect asks a SOCKS proxy for a connection.
func socksConnect(nc net.Conn, user *url.Userinfo, addr string) error {
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	port, err := net.LookupPort("tcp", portText)
	if err != nil {
		return err
	}
	methods := []byte{socksVersion, 1, socksNoAuth}
	if user != nil {
		methods = []byte{socksVersion, 2, socksNoAuth, socksPassword}
	}
	if _, err := nc.Write(methods); err != nil {
		return err
	}
	var answer [4]byte
	if _, err := io.ReadFull(nc, answer[:2]); err != nil {
		return err
	}
	switch {
	case answer[0] != socksVersion:
		return errors.New("speaks no SOCKS 5")
	case answer[1] == socksNoAuth:
	case answer[1] == socksPassword && user != nil:
		pw, _ := user.Password()
		name := user.Username()
		if len(name) == 0 || len(name) > 255 || len(pw) > 255 {
			return errors.New("name or password has no length that SOCKS allows")
		}
		msg := append([]byte{1, byte(len(name))}, name...)
		msg = append(append(msg, byte(len(pw))), pw...)
		if _, err := nc.Write(msg); err != nil {
			return err
		}
		if _, err := io.ReadFull(nc, answer[:2]); err != nil {
			return err
		}
		if answer[1] != 0 {
			return errors.New("refuses name or password")
		}
	default:
		return errors.New("wants another way to log in")
	}
	msg := []byte{socksVersion, socksConnectC, 0}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Unmap().Is4() {
		msg = append(append(msg, socksIPv4), ip.Unmap().AsSlice()...)
	} else if err == nil {
		msg = append(append(msg, socksIPv6), ip.AsSlice()...)
	} else if len(host) > 255 {
		return errors.New("host name too long")
	} else {
		msg = append(append(msg, socksName, byte(len(host))), host...)
	}
	if _, err := nc.Write(append(msg, byte(port>>8), byte(port))); err != nil {
		return err
	}
	if _, err := io.ReadFull(nc, answer[:]); err != nil {
		return err
	}
	if code := answer[1]; answer[0] != socksVersion || code != 0 {
		if int(code) < len(socksErrors) && code > 0 {
			return errors.New(socksErrors[code])
		}
		return fmt.Errorf("answers %d", code)
	}
	rest := 0
	switch answer[3] {
	case socksIPv4:
		rest = 4 + 2
	case socksIPv6:
		rest = 16 + 2
	case socksName:
		var n [1]byte
		if _, err := io.ReadFull(nc, n[:]); err != nil {
			return err
		}
		rest = int(n[0]) + 2
	default:
		return errors.New("answers with an unknown kind of address")
	}
	_, err = io.ReadFull(nc, make([]byte, rest))
	return err
}
