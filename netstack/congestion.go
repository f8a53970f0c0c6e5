package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// longTrip is the round trip from which CUBIC does better than Reno: below, it
// would do as Reno does (RFC 9438 section 4.3), but for the end of slow start.
// It ends that when the acknowledgements of one round come in over more than half
// of a round trip. Where a round trip is a fraction of a millisecond that
// means that the machine was busy with something else for a moment, and the
// connection goes on at a quarter of its speed for seconds.
const longTrip = 10 * time.Millisecond

// control chooses how the new connection finds out what the way takes. Endpoints
// begin with Reno.
func (c *Conn) control() {
	var info tcpip.TCPInfoOption
	if c.ep.GetSockOpt(&info) == nil && info.RTT > 0 && info.RTT < longTrip {
		return
	}
	cubic := tcpip.CongestionControlOption("cubic")
	c.ep.SetSockOpt(&cubic) // fails only for a name that is not known
}
