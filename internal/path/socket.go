package path

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxDatagram = 65535
	// maxTrain is the most bytes handed to the kernel as one train of
	// datagrams: from 65,494 on Linux splits trains in software, at three
	// times the cost.
	maxTrain = 65400
	// maxSegments is the most datagrams of one train that every kernel with
	// segmentation takes.
	maxSegments = 64
	socketBytes = 7 << 20
)

// sockets are the node's UDP sockets; either may be nil, and both may be one.
type sockets struct{ v4, v6 *socket }

func (s *sockets) each(do func(*socket)) {
	if s.v4 != nil {
		do(s.v4)
	}
	if s.v6 != nil && s.v6 != s.v4 {
		do(s.v6)
	}
}

// to returns the socket for a destination.
func (s *sockets) to(a netip.Addr) *socket {
	if a.Is4() {
		return s.v4
	}
	return s.v6
}

func (s *sockets) port4() uint16 { return s.v4.localPort() }
func (s *sockets) port6() uint16 { return s.v6.localPort() }

// socket is one UDP socket. Trains of datagrams go with one system call each
// way where the system can.
type socket struct {
	pc  net.PacketConn
	udp *net.UDPConn    // pc, if it is one
	raw syscall.RawConn // of udp; nil = there is no waiting without a buffer
	gro bool            // reads may return trains
	gso atomic.Bool     // writes may take trains
}

func (s *socket) localPort() uint16 {
	if s == nil {
		return 0
	}
	if a, ok := s.pc.LocalAddr().(*net.UDPAddr); ok {
		return uint16(a.Port)
	}
	return 0
}

func newSocket(pc net.PacketConn) *socket {
	s := &socket{pc: pc}
	if u, ok := pc.(*net.UDPConn); ok {
		s.udp = u
		if canAwait {
			s.raw, _ = u.SyscallConn() // nil if there is an error
		}
		// Best effort: the system's limits may be lower.
		u.SetReadBuffer(socketBytes)
		u.SetWriteBuffer(socketBytes)
		forceBuffers(u, socketBytes)
		dontFragment(u)
		gso, gro := offload(u)
		s.gso.Store(gso)
		s.gro = gro
	}
	return s
}

// listenFunc opens a UDP socket; see Config.ListenUDP.
type listenFunc = func(ctx context.Context, network, addr string) (net.PacketConn, error)

// openHost opens one socket of the host for both families, or one for each where
// that cannot be had.
func openHost(ctx context.Context, listen listenFunc, port uint16) (*sockets, error) {
	if pc, err := listen(ctx, "udp", ":"+strconv.Itoa(int(port))); err == nil {
		if a, ok := pc.LocalAddr().(*net.UDPAddr); ok && a.IP.To4() == nil {
			s := newSocket(pc)
			return &sockets{s, s}, nil
		}
		pc.Close()
	}
	return openSockets(ctx, listen, port)
}

// openSockets opens the sockets on one port if it can. A port of 0 is any.
func openSockets(ctx context.Context, listen listenFunc, port uint16) (*sockets, error) {
	var lastErr error
	// The port that the system chose for IPv4 may be taken for IPv6.
	for attempt := range 4 {
		p4, err := listen(ctx, "udp4", ":"+strconv.Itoa(int(port)))
		if err != nil {
			lastErr = err
			if errors.Is(err, syscall.EADDRINUSE) {
				return nil, fmt.Errorf("open UDP port %d: %w", port, err)
			}
			break
		}
		s := &sockets{v4: newSocket(p4)}
		p6, err := listen(ctx, "udp6", joinHostPort("::", int(s.v4.localPort())))
		if err == nil {
			s.v6 = newSocket(p6)
			return s, nil
		}
		if port != 0 || attempt == 3 || !errors.Is(err, syscall.EADDRINUSE) {
			return s, nil // IPv4 alone will do
		}
		p4.Close()
	}
	p6, err := listen(ctx, "udp6", joinHostPort("::", int(port)))
	if err != nil {
		return nil, fmt.Errorf("open UDP sockets: %w", errors.Join(lastErr, err))
	}
	return &sockets{v6: newSocket(p6)}, nil
}

func joinHostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// buffers are for reading. Readers borrow them while datagrams come: a process
// may hold many nodes, most of which hear nothing most of the time.
var buffers = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// keepBuffer is how long a reader keeps its buffer when nothing comes, at least.
const keepBuffer = time.Second

// reader reads datagrams from one socket; of one goroutine.
type reader struct {
	s    *socket
	buf  []byte             // nil = given back
	lent *[maxDatagram]byte // buf, if it is borrowed
	busy bool               // something came since the deadline was set
	oob  []byte
	out  [][]byte
}

func (s *socket) reader() *reader {
	r := &reader{s: s}
	if s.gro {
		r.oob = make([]byte, oobLen)
	}
	return r
}

// read waits for datagrams; those it returns are of one source and valid until
// the next read.
func (r *reader) read() (datagrams [][]byte, from netip.AddrPort, err error) {
	for {
		if r.buf == nil {
			if err := r.borrow(); err != nil {
				return nil, from, err
			}
		}
		n, size, from, err := r.receive()
		switch {
		case err == nil:
			r.busy = true
			r.out = r.out[:0]
			b := r.buf[:n]
			for size > 0 && len(b) > size {
				r.out = append(r.out, b[:size:size])
				b = b[size:]
			}
			return append(r.out, b[:len(b):len(b)]), unmap(from), nil
		case r.s.raw == nil || !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, from, err
		case r.busy:
			r.lend()
		default:
			r.release()
		}
	}
}

// borrow waits until there is something to read, where that can be known, and
// takes a buffer.
func (r *reader) borrow() error {
	if r.s.raw != nil {
		r.s.udp.SetReadDeadline(time.Time{})
		if err := r.s.raw.Read(readable); err != nil {
			return err
		}
	}
	r.lent = buffers.Get().(*[maxDatagram]byte)
	r.buf = r.lent[:]
	r.lend()
	return nil
}

// lend has the buffer go back after a while without datagrams.
func (r *reader) lend() {
	r.busy = false
	if r.s.raw != nil {
		r.s.udp.SetReadDeadline(time.Now().Add(keepBuffer))
	}
}

// release gives the buffer back; what read returned is void.
func (r *reader) release() {
	if r.lent != nil {
		buffers.Put(r.lent)
		r.buf, r.lent, r.out = nil, nil, nil
	}
}

// receive reads once. A size is that of the datagrams of a train.
func (r *reader) receive() (n, size int, from netip.AddrPort, err error) {
	switch {
	case r.s.gro:
		var oobn int
		n, oobn, _, from, err = r.s.udp.ReadMsgUDPAddrPort(r.buf, r.oob)
		if err == nil {
			size = segmentSize(r.oob[:oobn])
		}
	case r.s.udp != nil:
		n, from, err = r.s.udp.ReadFromUDPAddrPort(r.buf)
	default:
		var a net.Addr
		n, a, err = r.s.pc.ReadFrom(r.buf)
		if u, ok := a.(*net.UDPAddr); ok {
			from = u.AddrPort()
		}
	}
	return n, size, from, err
}

// write sends datagrams to one destination.
func (s *socket) write(to netip.AddrPort, datagrams [][]byte) error {
	for len(datagrams) > 0 {
		n := 1
		if s.gso.Load() {
			n = train(datagrams)
		}
		var err error
		if n > 1 {
			err = s.writeTrain(to, datagrams[:n])
		} else {
			err = s.writeOne(to, datagrams[0])
		}
		if err != nil {
			return err
		}
		datagrams = datagrams[n:]
	}
	return nil
}

func (s *socket) writeOne(to netip.AddrPort, b []byte) (err error) {
	if s.udp != nil {
		_, err = s.udp.WriteToUDPAddrPort(b, to)
	} else {
		_, err = s.pc.WriteTo(b, net.UDPAddrFromAddrPort(to))
	}
	return err
}

// train returns how many datagrams from the first on may go as one: all of the
// same size, only the last may be shorter.
func train(datagrams [][]byte) int {
	size := len(datagrams[0])
	if size == 0 {
		return 1
	}
	n, bytes := 1, size
	for n < len(datagrams) && n < maxSegments {
		l := len(datagrams[n])
		if l == 0 || l > size || bytes+l > maxTrain {
			break
		}
		n++
		bytes += l
		if l < size {
			break
		}
	}
	return n
}

// endToEnd returns the bytes of datagrams that lie end to end in memory already,
// as those of the tunnel do, and nil for others. None may be empty.
func endToEnd(datagrams [][]byte) []byte {
	all, n := datagrams[0], len(datagrams[0])
	all = all[:cap(all)]
	for _, d := range datagrams[1:] {
		if len(all)-n < len(d) || &all[n] != &d[0] {
			return nil
		}
		n += len(d)
	}
	return all[:n:n]
}

// trains are buffers where datagrams are laid end to end, controls those of
// control messages.
var (
	trains   = sync.Pool{New: func() any { return new([maxTrain]byte) }}
	controls = sync.Pool{New: func() any { return new([oobLen]byte) }}
)

func (s *socket) writeTrain(to netip.AddrPort, datagrams [][]byte) error {
	data := endToEnd(datagrams)
	if data == nil {
		t := trains.Get().(*[maxTrain]byte)
		defer trains.Put(t)
		n := 0
		for _, b := range datagrams {
			n += copy(t[n:], b)
		}
		data = t[:n]
	}
	c := controls.Get().(*[oobLen]byte)
	defer controls.Put(c)
	oob := segmentControl(c[:], uint16(len(datagrams[0])))
	_, _, err := s.udp.WriteMsgUDPAddrPort(data, oob, to)
	if err == nil || !offloadRefused(err) {
		return err
	}
	// The device cannot: go on one by one from now on. Unless it is the size of
	// a datagram that is refused, which says nothing about trains.
	for _, b := range datagrams {
		if err := s.writeOne(to, b); err != nil {
			return err
		}
	}
	s.gso.Store(false)
	return nil
}

// passing reports whether an error of a write says nothing about the
// destination: the system is short of buffers.
func passing(err error) bool {
	return errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR)
}
