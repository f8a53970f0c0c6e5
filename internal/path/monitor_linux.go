package path

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// watchNetwork opens the kernel's stream of changes.
func watchNetwork() (*networkEvents, error) {
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
	e := &networkEvents{changed: make(chan netChange, 1)}
	done := make(chan struct{})
	e.close = func() {
		f.Close()
		<-done
	}
	go func() {
		defer close(done)
		var parser netlinkParser
		buf := make([]byte, 16<<10)
		for {
			n, err := f.Read(buf)
			var c netChange
			switch {
			case err == nil:
				c = parser.parse(buf[:n])
			case errors.Is(err, unix.ENOBUFS):
				c = netChange{addresses: true, route: true} // some were lost
			default:
				return
			}
			if c == (netChange{}) {
				continue
			}
			select {
			case e.changed <- c:
			case old := <-e.changed:
				old.add(c)
				select { // nobody else sends
				case e.changed <- old:
				default:
				}
			}
		}
	}()
	return e, nil
}
