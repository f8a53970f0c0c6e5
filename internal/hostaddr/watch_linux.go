package hostaddr

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// listen opens the kernel's stream of changes and hands what it tells to notify,
// on a goroutine of its own, until end is called, which waits for that.
func listen(notify func(Change)) (end func(), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	done := make(chan struct{})
	go func() {
		defer close(done)
		var parser netlinkParser
		buf := make([]byte, 16<<10)
		for {
			n, err := f.Read(buf)
			var c Change
			switch {
			case err == nil:
				c = parser.parse(buf[:n])
			case errors.Is(err, unix.ENOBUFS):
				c = Change{Addresses: true, Route: true} // some were lost
			default:
				return
			}
			if c != (Change{}) {
				notify(c)
			}
		}
	}()
	return func() {
		f.Close()
		<-done
	}, nil
}
