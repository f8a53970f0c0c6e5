package path

import (
	"encoding/binary"
	"errors"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// oobLen is the room for one control message with a segment size.
const oobLen = 64

// offload turns on trains in reading and reports what the kernel can.
func offload(u *net.UDPConn) (gso, gro bool) {
	rc, err := u.SyscallConn()
	if err != nil {
		return false, false
	}
	rc.Control(func(fd uintptr) {
		_, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		gso = err == nil
		gro = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	})
	return gso, gro
}

// neverFragments says that dontFragment works.
const neverFragments = true

// dontFragment makes datagrams larger than a link on their way vanish, so that
// padded pings tell what passes, and pieces of datagrams never travel. The size
// of the local link is respected, ICMP messages are not believed.
func dontFragment(u *net.UDPConn) {
	rc, err := u.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		// The one that does not fit the socket's family fails, to no harm.
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	})
}

// forceBuffers goes past the system's limit where the process may.
func forceBuffers(u *net.UDPConn, n int) {
	rc, err := u.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n)
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n)
	})
}

// segmentControl writes the control message that makes a train of segments of
// the given size.
func segmentControl(b []byte, size uint16) []byte {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level = unix.IPPROTO_UDP
	h.Type = unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], size)
	return b[:unix.CmsgSpace(2)]
}

// segmentSize returns the size of a received train's segments, 0 if it is none.
func segmentSize(oob []byte) int {
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(oob) {
			return 0
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && n >= unix.CmsgLen(4) {
			return int(binary.NativeEndian.Uint32(oob[unix.CmsgLen(0):]))
		}
		next := unix.CmsgSpace(n - unix.CmsgLen(0))
		if next > len(oob) {
			return 0
		}
		oob = oob[next:]
	}
	return 0
}

// offloadRefused reports whether an error means that the device of this route
// cannot take trains.
func offloadRefused(err error) bool {
	return errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}
