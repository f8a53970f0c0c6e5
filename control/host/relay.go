package host

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/derp/relay"
	"mesh/identity"
	"mesh/internal/stun"
)

// errNotMember refuses who is not of the mesh.
var errNotMember = errors.New("not a member of this mesh")

// stunServer answers STUN on a socket of its own.
type stunServer struct {
	pc   net.PacketConn
	stop context.CancelFunc
	done chan struct{}
}

// startSTUN listens at addr ("" = the host of listen and DefaultSTUNPort) and
// answers; fail is told if the socket breaks.
func startSTUN(addr, listen string, log *zap.Logger, fail func(error)) (*stunServer, error) {
	if addr == "" {
		host, _, err := net.SplitHostPort(listen)
		if err != nil {
			return nil, fmt.Errorf("listen address %q: %w", listen, err)
		}
		addr = net.JoinHostPort(host, strconv.Itoa(DefaultSTUNPort))
	}
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for STUN: %w; choose another address with --stun, or \"off\"", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &stunServer{pc: pc, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		if err := (&stun.Server{Logger: log}).Serve(ctx, pc); err != nil && ctx.Err() == nil {
			fail(fmt.Errorf("STUN: %w", err))
		}
	}()
	return s, nil
}

// port is the one it listens on; -1, which the relay map takes for none, of a
// nil server.
func (s *stunServer) port() int {
	if s == nil {
		return -1
	}
	return s.pc.LocalAddr().(*net.UDPAddr).Port
}

// close stops the server and waits for it; a nil one needs no closing.
func (s *stunServer) close() {
	if s != nil {
		s.stop()
		s.pc.Close()
		<-s.done
	}
}

// makeRelay makes the relay of this process, its TLS and its entry in the relay
// map. With NoRelay the region is nil.
func (h *Host) makeRelay(stunPort int) (*tls.Config, *wire.DERPRegion, error) {
	name, port := hostOf(h.url)
	get, err := h.certificates()
	if err != nil {
		return nil, nil, err
	}
	if h.cfg.NoRelay {
		if get == nil {
			return nil, nil, nil
		}
		return withChallenge(&tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: get}, get), nil, nil
	}
	id, err := relayIdentityIn(h.cfg.DataDir, name, get != nil)
	if err != nil {
		return nil, nil, err
	}
	h.relay = relay.New(relay.Config{
		Key: id.key,
		Admit: func(_ context.Context, key identity.NodePublic, _ netip.Addr) error {
			if !h.server.Admit(key) {
				return errNotMember
			}
			return nil
		},
		Logger:         h.log,
		BytesPerSecond: h.cfg.RelayRate,
	})
	h.onClose(func() { h.relay.Close() })
	region := newRegion(h.region, "mesh", "embedded relay", name, port, stunPort, id.pin)
	if get != nil {
		return withChallenge(relay.TLSConfigFunc(get, h.relay), get), region, nil
	}
	return relay.TLSConfig(id.cert, h.relay), region, nil
}

// RelayStats tells what the embedded relay does; false if there is none.
func (h *Host) RelayStats() (relay.Stats, bool) {
	if h.relay == nil {
		return relay.Stats{}, false
	}
	return h.relay.Stats(), true
}

// drainFor serves nodes until they have moved to another relay, no longer than
// limit. 0 does nothing.
func drainFor(r *relay.Server, limit time.Duration, log *zap.Logger) {
	if r == nil || limit <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	// If this is a restart, the relay is back about when the drain would end.
	if n := r.Drain(ctx, limit, time.Minute); n > 0 {
		log.Info("relay ends with nodes at home here", zap.Int("connections", n))
	}
}

// drainRelay lets nodes move from the embedded relay to another, if one is there.
func (h *Host) drainRelay() {
	if h.relay != nil && h.server != nil && h.server.RelaysConnected() > 0 {
		drainFor(h.relay, h.cfg.Drain, h.log)
	}
}

// newRegion is the relay map's entry for one relay.
func newRegion(id int, code, title, host string, port, stunPort int, pin string) *wire.DERPRegion {
	n := &wire.DERPNode{
		Name:     fmt.Sprintf("%da", id),
		RegionID: id,
		HostName: host,
		CertName: pin,
		DERPPort: port,
		STUNPort: stunPort,
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		n.IPv4, n.IPv6 = "none", "none"
		if ip.Is4() {
			n.IPv4 = host
		} else {
			n.IPv6 = host
		}
		if ip.IsLoopback() {
			// Without it nobody probes an address that is not on the network.
			n.STUNTestIP = host
		}
	}
	return &wire.DERPRegion{RegionID: id, RegionCode: code, RegionName: title, Nodes: []*wire.DERPNode{n}}
}

// relayIdentity is what a relay keeps between runs.
type relayIdentity struct {
	key  identity.NodePrivate
	cert tls.Certificate
	pin  string // "" when cert is for the name's own authority to vouch for
}

// relayIdentityIn reads a relay's key and certificate from dir, or makes them.
// name is what clients dial: the self-signed certificate is made for it, unless
// the relay has one of another's.
func relayIdentityIn(dir, name string, other bool) (relayIdentity, error) {
	var id relayIdentity
	files, err := openFiles(dir)
	if err != nil {
		return id, err
	}
	defer files.Close()
	if id.key, err = nodeKeyIn(files, "relay.key"); err != nil {
		return id, err
	}
	if other {
		return id, nil
	}
	// The name is part of the file name: another name needs another
	// certificate, and going back to the first brings back its pin.
	base := "relay-" + fileName(name)
	certPEM, err := files.Read(base + ".crt")
	keyPEM, kerr := files.Read(base + ".pem")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(kerr, fs.ErrNotExist) {
		var names []string
		var ips []netip.Addr
		if ip, perr := netip.ParseAddr(name); perr == nil {
			ips = append(ips, ip)
		} else {
			names = append(names, name)
		}
		if certPEM, keyPEM, _, err = relay.SelfSigned(names, ips); err != nil {
			return id, err
		}
		// The key goes first: a certificate alone is of no use.
		if err = files.Write(base+".pem", keyPEM); err == nil {
			err = files.Write(base+".crt", certPEM)
		}
		kerr = nil
	}
	if err = errors.Join(err, kerr); err != nil {
		return id, fmt.Errorf("relay certificate: %w", err)
	}
	if id.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return id, fmt.Errorf("relay certificate in %s: %w; delete %s.crt and %s.pem to make a new one", dir, err, base, base)
	}
	if id.pin, err = relay.PinOf(certPEM); err != nil {
		return id, fmt.Errorf("relay certificate: %w", err)
	}
	return id, nil
}

func nodeKeyIn(files *identity.FileStore, name string) (identity.NodePrivate, error) {
	b, err := files.Read(name)
	if errors.Is(err, fs.ErrNotExist) {
		k := identity.NewNode()
		return k, files.Write(name, []byte(k.Secret()))
	}
	if err != nil {
		return identity.NodePrivate{}, err
	}
	k, err := identity.ParseNodePrivate(string(b))
	if err != nil {
		return k, fmt.Errorf("relay key %s: %w; restore it, or delete it to make a new one", name, err)
	}
	return k, nil
}

// fileName keeps of a host name what a state name may hold.
func fileName(host string) string {
	b := []byte(host)
	for i, c := range b {
		switch {
		case c >= 'A' && c <= 'Z':
			b[i] = c + 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '-':
		default:
			b[i] = '_'
		}
	}
	return string(b[:min(len(b), 50)])
}
