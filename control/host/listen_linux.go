package host

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// endUnanswered makes a connection end that leaves data without an answer for
// deadAfter, too: while there is such data, nobody is asked whether it lives, and to
// send it again takes the kernel a quarter of an hour. Where the kernel cannot, the
// server's own pings find those that are gone.
func endUnanswered(c syscall.Conn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return // it is closed
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
	})
}
