// Package netstack is a TCP/IP stack inside the process: gVisor's stack behind
// net.Listener, net.Conn and net.PacketConn, with IP packets on the other side.
// It knows nothing of peers, tunnels or policy; whoever builds a [Stack] gives
// it own addresses and a function for the packets that leave.
//
// # How packets flow
//
// Out: Conn.Write copies into the send queue of a gVisor endpoint. As soon as
// the windows allow, gVisor builds one TCP segment of up to 60 KB in the
// goroutine that made it possible (the writer's, the one that processed an
// acknowledgement, or a timer's). Our link (link.go) cuts that segment into
// packets of the MTU (gso.go), laid back to back in one pooled buffer, and
// calls Config.Out once with all of them. Everything else that leaves (SYN,
// ACK, RST, UDP, ICMP) is a batch of one packet, but for small data of many busy
// connections, which is collected (crowd.go) and leaves from a goroutine of its
// own. The buffer returns to the pool when Out returns.
//
// In: Stack.In copies each packet into a buffer of gVisor's pool and delivers it;
// consecutive segments of one connection become one large segment in one buffer
// (gro.go), which is handled once and answered by one acknowledgement. UDP and ICMP are handled in the caller's goroutine. TCP segments are put into the
// queue of their endpoint, and one of GOMAXPROCS processor goroutines works on
// them, so In does not wait for applications. Acknowledgements leave through
// Config.Out from that processor, or with the answer: one that says nothing
// else waits for data up to ten milliseconds, on a timer and without a goroutine
// (hold.go).
//
// Accept: gVisor completes handshakes in a listening endpoint (a real one, not
// a forwarder, because only that takes over a SYN that meets TIME_WAIT). A
// Listener moves them into a bounded queue; what does not fit is reset, so that a
// client sees an error and not silence.
//
// gVisor's stack is built when it is needed first (build.go): by a packet that
// comes in, a dial, a UDP socket or a listener on one address. Until then
// listeners on any address are entries of a table, which costs a process full of
// waiting nodes next to nothing.
//
// A packet to an own address never reaches the link, it is turned round inside.
//
// # What may be called from Out
//
// gVisor calls the link while it holds the lock of the sending endpoint.
// Therefore Out may call [Stack.Reject], the refusal of a flow, and may give
// packets to the In of another Stack, but no other method of its own Stack or of a
// connection on it. Out may wait for room, but what it waits for must not
// depend on this Stack: while it waits, the connection that sends does not
// answer its application, and Close and Abort wait too.
//
// # Errors
//
// Errors are those of package net: *net.OpError around a syscall.Errno,
// net.ErrClosed, os.ErrDeadlineExceeded or the error given to Reject or
// Abort; io.EOF is bare. A connection that was reset never reads as a clean end.
package netstack
