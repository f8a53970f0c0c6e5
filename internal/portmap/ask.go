package portmap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

const (
	// A request is sent askTries times; the first wait is askWait, and each
	// next one twice as long.
	askTries = 3
	askWait  = 250 * time.Millisecond
	// maxAnswer is the longest datagram that is read.
	maxAnswer = 2048
	// maxReadErrors in a row end a conversation. Single ones do not: some
	// systems report ICMP errors there, and these anybody can cause.
	maxReadErrors = 16
)

// socket is a UDP socket for one conversation with the gateway.
type socket struct {
	net.PacketConn
	stop func() bool
	buf  [maxAnswer]byte
	errs int
}

// open opens a socket on a port that the system chooses, at our address
// towards the gateway: PCP demands that packets come from there. It is
// closed when ctx ends.
func (c *Client) open(ctx context.Context, l link) (*socket, error) {
	network := "udp4"
	if l.self.Is6() {
		network = "udp6"
	}
	pc, err := c.cfg.ListenUDP(ctx, network, net.JoinHostPort(l.self.String(), "0"))
	if err != nil {
		return nil, fmt.Errorf("open a socket towards the gateway: %w", err)
	}
	s := &socket{PacketConn: pc}
	s.stop = context.AfterFunc(ctx, func() { pc.Close() })
	return s, nil
}

func (s *socket) close() {
	s.stop()
	s.Close()
}

func (s *socket) send(to netip.AddrPort, b []byte) error {
	_, err := s.WriteTo(b, net.UDPAddrFromAddrPort(to))
	return err
}

// receive waits for a datagram until the deadline; os.ErrDeadlineExceeded says
// that none came. It is valid until the next call.
func (s *socket) receive(deadline time.Time) (b []byte, from netip.AddrPort, err error) {
	if err := s.SetReadDeadline(deadline); err != nil {
		return nil, from, err
	}
	for {
		n, a, err := s.ReadFrom(s.buf[:])
		if err == nil {
			if u, ok := a.(*net.UDPAddr); ok {
				from = u.AddrPort()
				from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			}
			s.errs = 0
			return s.buf[:n], from, nil
		}
		if s.errs++; s.errs > maxReadErrors || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return nil, from, err
		}
	}
}

// ask sends a request to the gateway until an answer of its is taken.
func (c *Client) ask(ctx context.Context, l link, request []byte, take func([]byte) bool) error {
	s, err := c.open(ctx, l)
	if err != nil {
		return err
	}
	defer s.close()
	gw := netip.AddrPortFrom(l.gw, gatewayPort)
	wait := askWait
	for range askTries {
		if err := s.send(gw, request); err != nil {
			return cause(ctx, fmt.Errorf("send to the gateway: %w", err))
		}
		deadline := time.Now().Add(wait)
		wait *= 2
		for {
			b, from, err := s.receive(deadline)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return cause(ctx, fmt.Errorf("hear from the gateway: %w", err))
			}
			if from == gw && take(b) {
				return nil
			}
		}
	}
	return errSilent
}

// cause prefers the reason for which a socket was closed under our feet.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
