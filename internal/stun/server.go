package stun

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Server answers STUN requests. It keeps no state but a fixed table for the
// rate limit, so no flood makes it grow. The zero value is ready to use. Its
// fields must not change while Serve runs.
type Server struct {
	// Rate is how many answers per second one source address gets (for IPv6:
	// one /64); a burst of twice as many passes. 0 means 100; negative means no limit.
	Rate int
	// Logger receives errors of the socket; nil is silent.
	Logger *zap.Logger

	answered atomic.Uint64
	ignored  atomic.Uint64
	limited  atomic.Uint64
}

// Stats counts datagrams since the server was made.
type Stats struct {
	Answered uint64 // requests answered
	Ignored  uint64 // datagrams that are no request of ours
	Limited  uint64 // requests dropped by the rate limit
}

// Stats returns the counters. It may be called at any time.
func (s *Server) Stats() Stats {
	return Stats{s.answered.Load(), s.ignored.Load(), s.limited.Load()}
}

const (
	defaultRate = 100
	// After manyErrors in a row Serve pauses between reads. It does not give
	// up: some systems report ICMP errors as errors of the socket, and these
	// strangers can cause at will.
	manyErrors = 100
	errorPause = 10 * time.Millisecond
)

// Serve answers the requests that arrive at pc until ctx ends (nil) or pc is
// closed (an error that matches net.ErrClosed). It does not close pc. Several calls may run at once on different sockets.
func (s *Server) Serve(ctx context.Context, pc net.PacketConn) error {
	logger := s.Logger
	if logger == nil {
		logger = zap.NewNop()
	}
	stop := context.AfterFunc(ctx, func() { pc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	sock := newSocket(pc)
	lim := newLimiter(s.Rate)
	in := make([]byte, 1<<16) // holds any datagram: on some systems a longer one is an error
	out := make([]byte, 0, ResponseLen6)
	for errs := 0; ; {
		n, src, err := sock.read(in)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("stun: read: %w", err)
			}
			logger.Debug("stun read", zap.Error(err))
			if errs++; errs >= manyErrors {
				select {
				case <-ctx.Done():
				case <-time.After(errorPause):
				}
			}
			continue
		}
		errs = 0
		out = s.answer(lim, time.Now(), in[:n], src, out[:0])
		if len(out) == 0 {
			continue
		}
		if err := sock.write(out, src); err != nil {
			logger.Debug("stun write", zap.Stringer("endpoint", src), zap.Error(err))
		}
	}
}

// answer appends the response to datagram b, or nothing, to out.
func (s *Server) answer(lim *limiter, now time.Time, b []byte, src netip.AddrPort, out []byte) []byte {
	tx, err := ParseRequest(b)
	// Port 0 cannot be a client; it would make us talk to nobody.
	if err != nil || !src.IsValid() || src.Port() == 0 {
		s.ignored.Add(1)
		return out
	}
	if !lim.allow(src.Addr(), now) {
		s.limited.Add(1)
		return out
	}
	s.answered.Add(1)
	return AppendResponse(out, tx, src)
}

// socket reads and writes without allocation where pc is a UDP socket of the
// system, and by way of net.Addr where it is a double.
type socket struct {
	pc  net.PacketConn
	udp *net.UDPConn // nil for a double
}

func newSocket(pc net.PacketConn) socket {
	udp, _ := pc.(*net.UDPConn)
	return socket{pc, udp}
}

func (s socket) read(b []byte) (int, netip.AddrPort, error) {
	if s.udp != nil {
		return s.udp.ReadFromUDPAddrPort(b)
	}
	n, addr, err := s.pc.ReadFrom(b)
	if err != nil {
		return 0, netip.AddrPort{}, err
	}
	if a, ok := addr.(*net.UDPAddr); ok {
		return n, a.AddrPort(), nil
	}
	ap, err := netip.ParseAddrPort(addr.String())
	return n, ap, err
}

func (s socket) write(b []byte, dst netip.AddrPort) error {
	var err error
	if s.udp != nil {
		_, err = s.udp.WriteToUDPAddrPort(b, dst)
	} else {
		_, err = s.pc.WriteTo(b, net.UDPAddrFromAddrPort(dst))
	}
	return err
}

// limiter is a fixed table of token buckets, chosen by a keyed hash of the
// source. Sources that meet in one bucket share it, which nobody can force
// without knowing the seed; in return there is nothing to evict.
type limiter struct {
	rate  float64 // tokens per second; 0 = no limit
	burst float64
	seed  maphash.Seed
	table []bucket
}

type bucket struct {
	tokens float64
	last   int64 // nanoseconds since the epoch
}

const buckets = 1 << 14

func newLimiter(perSecond int) *limiter {
	if perSecond < 0 {
		return &limiter{}
	}
	if perSecond == 0 {
		perSecond = defaultRate
	}
	return &limiter{
		rate:  float64(perSecond),
		burst: 2 * float64(perSecond),
		seed:  maphash.MakeSeed(),
		table: make([]bucket, buckets),
	}
}

func (l *limiter) allow(src netip.Addr, now time.Time) bool {
	if l.rate == 0 {
		return true
	}
	key := src.As16()
	part := key[:]
	if src.Unmap().Is6() {
		part = key[:8]
	}
	b := &l.table[maphash.Bytes(l.seed, part)%buckets]
	t := now.UnixNano()
	if b.last == 0 {
		b.tokens = l.burst
	} else if t > b.last {
		b.tokens = min(l.burst, b.tokens+float64(t-b.last)*l.rate/1e9)
	}
	b.last = t
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
