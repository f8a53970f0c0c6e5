package actor

import (
	"fmt"
	"io"
	"time"

	"mesh"
)

// Beat makes a node process call a peer that serves, keep the connection busy
// with a small message every Every, and watch the path.
type Beat struct {
	Addr  string
	Every time.Duration // 0 = 20 ms
	For   time.Duration // it ends then, or
	Until string        // when the path is this, "" = any
	Still time.Duration // but not before, if Until is set or not; 0 = For without Until
}

// Beaten is what a Beat saw. Durations count from its beginning.
type Beaten struct {
	First  time.Duration // until the first answer
	Path   string        // at the end: "direct", "relay"
	Direct time.Duration // until the path was first direct, 0 = never
	Gap    time.Duration // longest time without an answer after the first
	Well   time.Duration // until the end of the longest gap
	Count  int           // answers
	Error  string        // why it ended early
}

func (a *agent) beat(b Beat) (any, error) {
	if b.Every == 0 {
		b.Every = 20 * time.Millisecond
	}
	begin := time.Now()
	c, err := a.open(b.Addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	peer, _ := mesh.PeerOf(c)
	path := func() string {
		for _, p := range a.node.Status().Peers {
			if p.ID == peer.ID {
				return p.Path.Kind
			}
		}
		return ""
	}
	r := Beaten{First: time.Since(begin)}
	last := time.Now()
	tick := time.NewTicker(b.Every)
	defer tick.Stop()
	message := []byte("beat")
	for {
		c.SetDeadline(time.Now().Add(Patience))
		if _, err = c.Write(message); err == nil {
			_, err = io.ReadFull(c, message)
		}
		if err != nil {
			r.Error = fmt.Sprintf("after %d answers: %v", r.Count, err)
			return r, nil
		}
		now := time.Now()
		if gap := now.Sub(last); gap > r.Gap {
			r.Gap, r.Well = gap, now.Sub(begin)
		}
		last = now
		r.Count++
		r.Path = path()
		if r.Path == "direct" && r.Direct == 0 {
			r.Direct = now.Sub(begin)
		}
		age := now.Sub(begin)
		if age >= b.For || age >= b.Still && (b.Until != "" && r.Path == b.Until || b.Until == "" && b.Still > 0) {
			return r, nil
		}
		select {
		case <-tick.C:
		case <-a.ctx.Done():
			return r, a.ctx.Err()
		}
	}
}
