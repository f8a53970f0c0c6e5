//go:build !linux

package path

import "net"

const oobLen = 0

// Trains are known on Linux only; elsewhere each datagram is a system call.

func offload(*net.UDPConn) (gso, gro bool) { return false, false }

const neverFragments = false

// Fragments are left to the system's default.
func dontFragment(*net.UDPConn) {}

func forceBuffers(*net.UDPConn, int) {}

func segmentControl(b []byte, _ uint16) []byte { return b[:0] }

func segmentSize([]byte) int { return 0 }

func offloadRefused(error) bool { return false }
