package main

import (
	"io"
	"net"
	"slices"
	"sync"

	"mesh"
	"mesh/identity"
)

// door passes connections from the mesh on to a unix socket.
type door struct {
	l      net.Listener
	socket string
	wg     sync.WaitGroup

	mu    sync.Mutex // guards the fields below
	seen  []caller
	inUse map[net.Conn]struct{}
	shut  bool
}

// caller is who came through the door.
type caller struct {
	peer        identity.Peer
	connections int
}

// open lets callers in until close.
func open(l net.Listener, socket string) *door {
	d := &door{l: l, socket: socket, inUse: map[net.Conn]struct{}{}}
	d.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.wg.Go(func() { d.pass(c) })
		}
	})
	return d
}

// pass connects one caller with the server.
func (d *door) pass(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("unix", d.socket)
	if err != nil {
		return
	}
	defer out.Close()
	if !d.note(in, out) {
		return
	}
	defer d.forget(in, out)
	var both sync.WaitGroup
	both.Go(func() { pump(out, in) })
	both.Go(func() { pump(in, out) })
	both.Wait()
}

// pump copies until one side ends, and says so to the other.
func pump(to, from net.Conn) {
	if _, err := io.Copy(to, from); err != nil {
		// Broken, not ended: nothing more will come of the other half either.
		to.Close()
		from.Close()
		return
	}
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

func (d *door) note(in, out net.Conn) bool {
	peer, _ := mesh.PeerOf(in)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut {
		return false
	}
	d.inUse[in], d.inUse[out] = struct{}{}, struct{}{}
	i := slices.IndexFunc(d.seen, func(c caller) bool { return c.peer.ID == peer.ID })
	if i < 0 {
		d.seen = append(d.seen, caller{peer: peer})
		i = len(d.seen) - 1
	}
	d.seen[i].connections++
	return true
}

func (d *door) forget(conns ...net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range conns {
		delete(d.inUse, c)
	}
}

// callers tells who came, in order of their first connection.
func (d *door) callers() []caller {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.seen)
}

// close lets nobody in any more, ends what is open and waits for it.
func (d *door) close() {
	d.l.Close()
	d.mu.Lock()
	d.shut = true
	for c := range d.inUse {
		c.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
}
