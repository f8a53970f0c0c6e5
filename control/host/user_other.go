//go:build !linux

package host

import "net"

// userOf is the name of the user whose process is at the other end of a unix
// socket; it is not known here.
func userOf(net.Conn) string { return "" }
