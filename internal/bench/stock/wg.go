package main

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"mesh/internal/bench/load"
)

// wgPort plus the index is a node's UDP port.
const wgPort = 20000

// wgNode is a WireGuard device. Keys, ports and addresses follow from the index,
// so that nobody has to tell them.
type wgNode struct {
	dev   *device.Device
	count int
	net   *netstack.Net
	addr  netip.Addr
}

func wgKey(index int) *ecdh.PrivateKey {
	seed := sha256.Sum256([]byte{byte(index)})
	k, err := ecdh.X25519().NewPrivateKey(seed[:])
	if err != nil {
		panic(err) // any 32 bytes are a key
	}
	return k
}

func wgAddr(index int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(index)}) }

func newDevice(_ context.Context, a load.NodeArgs) (load.Node, error) {
	if a.Index < 1 || a.Index > 255 {
		return nil, fmt.Errorf("index %d is not in 1 to 255", a.Index)
	}
	if a.MTU == 0 {
		a.MTU = 1280
	}
	addr := wgAddr(a.Index)
	tun, stack, err := netstack.CreateNetTUN([]netip.Addr{addr}, nil, a.MTU)
	if err != nil {
		return nil, err
	}
	dev := device.NewDevice(tun, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
	var cfg strings.Builder
	fmt.Fprintf(&cfg, "private_key=%s\nlisten_port=%d\n", hex.EncodeToString(wgKey(a.Index).Bytes()), wgPort+a.Index)
	for i := 1; i <= a.Count; i++ {
		if i != a.Index {
			fmt.Fprintf(&cfg, "public_key=%s\nendpoint=127.0.0.1:%d\nallowed_ip=%s/32\n",
				hex.EncodeToString(wgKey(i).PublicKey().Bytes()), wgPort+i, wgAddr(i))
		}
	}
	if err := dev.IpcSet(cfg.String()); err != nil {
		return nil, err
	}
	if err := dev.Up(); err != nil {
		return nil, err
	}
	return &wgNode{dev, a.Count, stack, addr}, nil
}

func (n *wgNode) Addr() string { return n.addr.String() }
func (n *wgNode) Listen(port int) (net.Listener, error) {
	return n.net.ListenTCPAddrPort(netip.AddrPortFrom(n.addr, uint16(port)))
}
func (n *wgNode) Dial(ctx context.Context, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return n.net.DialContextTCPAddrPort(ctx, to)
}
func (n *wgNode) Direct(string) bool { return true }
func (n *wgNode) Peers() int         { return n.count - 1 }

func (n *wgNode) Close() error {
	n.dev.Close()
	return nil
}
