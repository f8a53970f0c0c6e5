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
	Until string        // when the path is this, "" = never
}

// Beaten is what a Beat saw. Durations count from its beginning.
type Beaten struct {
	First  time.Duration // until the first answer
	Path   string        // at the end: "direct", "relay"
	Direct time.Duration // until the path was first direct, 0 = never
	Gap    time.Duration // longest time without an answer after the first
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
				return p.Path
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
		r.Gap, last = max(r.Gap, now.Sub(last)), now
		r.Count++
		r.Path = path()
		if r.Path == "direct" && r.Direct == 0 {
			r.Direct = now.Sub(begin)
		}
		if now.Sub(begin) >= b.For || b.Until != "" && r.Path == b.Until {
			return r, nil
		}
		select {
		case <-tick.C:
		case <-a.ctx.Done():
			return r, a.ctx.Err()
		}
	}
}
