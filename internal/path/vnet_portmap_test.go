package path_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/internal/path"
	"mesh/internal/portmap"
	"mesh/internal/vnet"
)

// natPMP lets a router answer the protocol of RFC 6886 in its LAN, until the
// internet is closed.
func (w *world) natPMP(r *vnet.Router) {
	pc, err := r.ListenUDP(w.t.Context(), "udp4", ":5351")
	if err != nil {
		w.t.Fatal(err)
	}
	w.wg.Go(func() {
		began := time.Now()
		b := make([]byte, 100)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 2 || b[0] != 0 {
				continue
			}
			answer := []byte{0, 128 + b[1], 0, 0}
			answer = binary.BigEndian.AppendUint32(answer, uint32(time.Since(began)/time.Second))
			switch {
			case b[1] == 0:
				ip := r.WAN().As4()
				answer = append(answer, ip[:]...)
			case b[1] == 1 && n >= 12:
				port, want := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
				life := binary.BigEndian.Uint32(b[8:])
				host := from.(*net.UDPAddr).AddrPort().Addr()
				public, err := r.Forward(vnet.UDP, want, netip.AddrPortFrom(host, port), time.Duration(life)*time.Second)
				if err != nil {
					answer[3] = 4 // out of resources
				}
				answer = append(answer, b[4:6]...)
				answer = binary.BigEndian.AppendUint16(answer, public.Port())
				answer = append(answer, b[8:12]...)
			default:
				answer[3] = 5 // unsupported
			}
			pc.WriteTo(answer, from)
		}
	})
}

// mapped starts an agent that asks its router for a port.
func (w *world) mapped(name string, spec vnet.NAT) site {
	w.t.Helper()
	r := w.n.NAT(spec)
	w.natPMP(r)
	h := r.Host()
	a := w.agent(name, h)
	var c *portmap.Client
	ready := make(chan struct{}) // c is set
	c = portmap.New(portmap.Config{
		LocalPort: a.LocalPort,
		Changed: func() {
			<-ready
			var list []path.Endpoint
			if at, ok := c.Mapping(); ok {
				list = []path.Endpoint{{Addr: at, Type: wire.EndpointPortMapped}}
			}
			a.SetEndpoints(list)
		},
		ListenUDP: h.ListenUDP, DialTCP: h.DialTCP,
		Gateway: func() (gw, self netip.Addr, ok bool) { return r.Gateway(), h.Addr(), true },
	})
	close(ready)
	a.also = append(a.also, c)
	return site{a, h, r}
}

// Who gets a port from its router is direct with everybody who has UDP.
func TestVnetPortMapped(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			inWorld(t, 1, func(t *testing.T, w *world) {
				a, b := w.mapped("a", vnet.Symmetric()), w.agent(k.name, k.make(w.n))
				time.Sleep(5 * time.Second) // the router is asked in this time
				direct := k.name != "udpblk"
				settled(t, a.agent, b, direct)
				t.Log(how(a.agent, b))
				if !direct {
					return
				}
				r := watch(a.agent, b, 10*time.Second)
				if r.gap > 2*every || r.moved != 0 {
					t.Errorf("not stable: %+v", r)
				}
			})
		})
	}
}
