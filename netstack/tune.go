package netstack

import (
	"fmt"
	"math/rand/v2"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	defaultMTU = 1280
	minMTU     = 1280 // RFC 8200 section 5: below this IPv6 does not work
	maxMTU     = 65535

	// halfOpen bounds the handshakes a listener has under way; beyond it
	// gVisor answers with SYN cookies.
	halfOpen = 1024

	// TCP buffers start at the default and grow with the bandwidth-delay
	// product: 8 MB is 200 MB/s at 20 ms. See window.go for those that receive.
	minBuffer     = 4 << 10
	defaultBuffer = 1 << 20
	maxBuffer     = 8 << 20

	udpBuffer = 1 << 20

	// timeWait is how long a closed connection keeps its addresses. The
	// queues between two nodes hold a packet for seconds at most, so this is
	// shorter than the minute common elsewhere and a busy server keeps less.
	timeWait = 15 * time.Second

	// Keepalive finds a peer that vanished in about four minutes, and is rare
	// enough to let the tunnel to an idle peer fall asleep.
	keepAliveIdle     = 2 * time.Minute
	keepAliveInterval = 30 * time.Second
	keepAliveCount    = 4

	// maxRTO bounds how long TCP waits before it tries again. What loses
	// everything here is a path that changes, for seconds, and whoever waits
	// should notice soon after it is there again; what is lost by congestion
	// is repeated far sooner. It is more than round trips take.
	maxRTO = 2 * time.Second
	// maxRetries gives up after about a quarter of an hour, as elsewhere.
	maxRetries = 450

	// maxTrain bounds the bytes on the wire of one batch made of one segment,
	// counting tunnelOverhead for each packet: the kernel refuses to segment
	// UDP trains near 64 KiB in hardware.
	maxTrain       = 65400
	tunnelOverhead = 48
)

// source takes random numbers from the runtime's, which has no state for each
// stack and cannot be foreseen.
type source struct{}

func (source) Int63() int64 { return rand.Int64() }
func (source) Seed(int64)   {}

// newGVisor builds a stack without addresses: no forwarding, no router
// discovery, no duplicate address detection, no multicast reports.
func newGVisor() (*stack.Stack, error) {
	quiet()
	st := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        true,
		RandSource:         source{},
		// Tables that nobody has filled let everything through; the usual ones
		// do the same, in kilobytes.
		IPTables: new(stack.IPTables),
	})
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	reuse := tcpip.TCPTimeWaitReuseGlobal
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	// gVisor's RACK may leave a connection that lost the last segments of both
	// directions without any timer running, for ever. Without it the classic
	// retransmission timer does the work, at no cost in speed.
	recovery := tcpip.TCPRecovery(0)
	rto := tcpip.TCPMaxRTOOption(maxRTO)
	retries := tcpip.TCPMaxRetriesOption(maxRetries)
	for _, opt := range []tcpip.SettableTransportProtocolOption{
		&sack, &moderate, &reuse, &wait, &recovery, &rto, &retries,
	} {
		if err := st.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			st.Destroy()
			return nil, fmt.Errorf("netstack: set TCP option %T: %v", opt, err)
		}
	}
	return st, nil
}

// gsoSize is the largest segment gVisor may hand to the link for an MTU, such
// that the packets it is cut into stay below maxTrain on the wire.
func gsoSize(mtu int) uint32 {
	packets := max(1, maxTrain/(mtu+tunnelOverhead))
	return uint32(min(packets*(mtu-80)+header.TCPTotalHeaderMaximumSize, maxTrain))
}
