//go:build unix

package path

import "golang.org/x/sys/unix"

// canAwait says that sockets can be waited for without a buffer.
const canAwait = true

// readable reports whether a read of a socket would not wait.
func readable(fd uintptr) bool {
	set := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(set[:], 0)
	return n != 0 || err != nil && err != unix.EINTR && err != unix.EAGAIN
}
