package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// A peer that made its session with the new key of a node does not drop it any more:
// another handshake with it is in no haste, though the node began none.
func TestHasteEnds(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		time.Sleep(rejectAfter + keepaliveAfter) // no session is left, and there is nothing to renew
		next, former := identity.NewNode(), a.key
		if err := a.t.SetKey(next); err != nil {
			t.Fatal(err)
		}
		b.forget(a)
		a.key = next.Public()
		b.knows(a)
		nw.mu.Lock()
		nw.nodes[a.key] = a
		nw.mu.Unlock()
		b.t.Update([]identity.NodePublic{former, a.key})
		b.say(t, a, "y")
		a.wantGot(t, b, "y")
		nw.mu.Lock()
		record := nw.wire
		nw.wire = func(from, to *node, d []byte) [][]byte {
			out := record(from, to, d)
			if from == b {
				return nil
			}
			return out
		}
		nw.mu.Unlock()
		before := len(tp.of("a>b", typeInitiation))
		a.say(t, b, "z")
		time.Sleep(silenceAfter + rekeyTimeout - time.Second)
		synctest.Wait()
		if n := len(tp.of("a>b", typeInitiation)) - before; n != 1 {
			t.Errorf("%d initiations within %v", n, rekeyTimeout-time.Second)
		}
	})
}

// A node gets a new key while packets go both ways. Its own sessions live until
// the new ones are there. The peer, as soon as its netmap has the new key alone,
// hears nothing of the old one: what is on its way then is lost, and what was
// sent until the new session is there, which takes as long as the slower of
// both to learn of the new key, and two round trips. Nothing the other way.
func TestRotation(t *testing.T) {
	const (
		trip  = 5 * time.Millisecond
		after = 3 * time.Second
	)
	pace := time.Duration(unlessRace(2, 5)) * time.Millisecond
	for _, by := range []time.Duration{-time.Second, -50 * time.Millisecond, 0, 50 * time.Millisecond, time.Second, 20 * time.Second} {
		for _, talk := range []string{"both", "rotating", "peer", "both, prepared", "peer, prepared"} {
			talk, _, prepared := strings.Cut(talk, ", ")
			t.Run(fmt.Sprintf("netmap %v after the key, %s talks, prepared %v", by, talk, prepared), func(t *testing.T) {
				bubble(t, func(t *testing.T, nw *network) {
					private := [2]identity.NodePrivate{identity.NewNode(), identity.NewNode()}
					var (
						mu    sync.Mutex
						known = private[0].Public() // a's key as b's netmap has it
						nodes [2]*node              // a, b
					)
					peerOf := func(me int) identity.NodePublic { // as the path of me names it
						mu.Lock()
						defer mu.Unlock()
						if me == 0 {
							return nodes[1].key
						}
						return known
					}
					for i := range nodes {
						nodes[i] = nw.add(t, []string{"a", "b"}[i], byte(i+1), func(c *Config) {
							if i == 0 {
								c.Key = private[0]
							}
							c.Lookup = func(k identity.NodePublic) (Peer, bool) {
								return Peer{Key: k, AllowedIPs: nodes[1-i].prefixes()}, k == peerOf(i)
							}
							c.Send = func(to identity.NodePublic, _ netip.AddrPort, datagrams [][]byte) error {
								if to != peerOf(i) {
									return errors.New("no such node")
								}
								for _, d := range datagrams {
									d = append([]byte(nil), d...)
									later(trip, func() { nodes[1-i].arrive(Source{Peer: peerOf(1 - i)}, [][]byte{d}) })
								}
								return nil
							}
						})
					}
					a, b := nodes[0], nodes[1]
					rotate := func() {
						if err := a.t.SetKey(private[1]); err != nil {
							t.Error(err)
						}
					}
					learn := func() {
						mu.Lock()
						old := known
						known = private[1].Public()
						mu.Unlock()
						b.t.Update([]identity.NodePublic{old, private[1].Public()})
					}
					sent := [2]int{}
					run := func(d time.Duration) {
						for begin := time.Now(); time.Since(begin) < d; time.Sleep(pace) {
							if talk != "peer" {
								a.t.Send(b.key, [][]byte{packet(a.v4, b.v4, "x")})
								sent[0]++
							}
							if talk != "rotating" {
								b.t.Send(peerOf(1), [][]byte{packet(b.v4, a.v4, "y")})
								sent[1]++
							}
						}
					}
					run(time.Second)
					if prepared { // it answers to the new key, before it uses that
						if err := a.t.AddKey(private[1]); err != nil {
							t.Fatal(err)
						}
					}
					first, second, between := rotate, learn, by
					if by < 0 {
						first, second, between = learn, rotate, -by
					}
					first()
					run(between)
					second()
					run(after)
					time.Sleep(time.Second)
					synctest.Wait()
					lost := [2]int{sent[0] - len(b.take()), sent[1] - len(a.take())}
					t.Logf("%d of %d packets of the rotating node lost, %d of %d to it", lost[0], sent[0], lost[1], sent[1])
					limit := [2]int{int(6 * trip / pace), 0}
					if by < 0 && !prepared {
						limit[0] += int(-by / pace)
						limit[1] = max(0, limit[0]-stagedPackets)
					}
					for i := range limit {
						if lost[i] > limit[i] || lost[i] < 0 {
							t.Errorf("way %d: %d lost, at most %d", i, lost[i], limit[i])
						}
					}
					if at, ok := a.t.LastHandshake(b.key); !ok || time.Since(at) > after+time.Second+6*time.Second {
						t.Errorf("no new session: %v", time.Since(at))
					}
				})
			})
		}
	}
}
