package interop

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// narrowPolicy lets everybody use HTTP and nothing else.
const narrowPolicy = `{
	"tagOwners": {"tag:a": [], "tag:s": []},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:80"]}]}`

// refusal is how a dial of a stock node to somebody who refuses it ends.
type refusal struct{ tcp, udp string }

// refusedBy dials the echo services of a member, which the policy denies.
func (n *stockNode) refusedBy(to member, six bool) (r refusal) {
	addr := port(to, six, 7)
	err := n.try("open", map[string]any{"Name": addr, "Addr": addr, "Seconds": 2}, nil)
	if err != nil {
		r.tcp = strings.ReplaceAll(err.Error(), to.at(six).String(), "PEER")
	}
	if _, err := n.datagram(addr, "x", 3); err != nil {
		r.udp = err.Error()
	}
	return r
}

// A stock node that our policy denies a port meets with the same at a node of
// ours as at a stock node, whose filter we compiled as well: silence, since
// tsnet does not look at what a refuser says.
func TestStockIsDenied(t *testing.T) {
	m := meshtest.Start(t, narrowPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, phone, ours)
	var wg sync.WaitGroup
	for _, six := range []bool{false, true} {
		// What is allowed goes, so nothing but the policy can be in the way.
		whoAmI(t, laptop, ours, six)
		whoAmI(t, laptop, phone, six)
		wg.Go(func() {
			first := make(chan refusal)
			go func() { first <- laptop.refusedBy(ours, six) }()
			byStock := laptop.refusedBy(phone, six)
			byOurs := <-first
			want := refusal{tcp: "context deadline exceeded", udp: "no answer"}
			if byStock != want {
				t.Errorf("refused by stock, IPv6 %v: %+v, want %+v", six, byStock, want)
			}
			if byOurs != byStock {
				t.Errorf("refused by ours, IPv6 %v: %+v, by stock: %+v", six, byOurs, byStock)
			}
		})
	}
	wg.Wait()
	for _, six := range []bool{false, true} {
		whoAmI(t, laptop, ours, six)
		whoAmI(t, laptop, phone, six)
	}
}

// A node of ours that a stock node refuses hears it at once where the stock
// node says so, which is for TCP over IPv4.
func TestOursIsDeniedByStock(t *testing.T) {
	m := meshtest.Start(t, narrowPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	whoAmI(t, ours, laptop, false)

	dial := func(network string, six bool, atMost time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), atMost)
		defer cancel()
		c, err := ours.Dial(ctx, network, port(laptop, six, 7))
		if err == nil {
			c.Close()
		}
		return err
	}
	err := dial("tcp", false, meshtest.Patience)
	var denied *mesh.DeniedError
	if !errors.Is(err, mesh.ErrDenied) || !errors.As(err, &denied) || denied.Peer.ShortName() != "laptop" || denied.Port != 7 {
		t.Errorf("TCP over IPv4: %v", err)
	}
	// Over IPv6 it is silent, and the dial ends with its time.
	if err := dial("tcp", true, 2*time.Second); err == nil || errors.Is(err, mesh.ErrDenied) || !timeout(err) {
		t.Errorf("TCP over IPv6: %v", err)
	}
	if answer, err := ours.datagram(port(laptop, false, 7), "x", 3); err == nil {
		t.Errorf("UDP: %q", answer)
	}

	// A stock node with its shields up says another reason.
	laptop.do("shields", map[string]any{"On": true}, nil)
	until(t, "the stock node to shield itself", func() bool {
		c, err := ours.Dial(t.Context(), "tcp", port(laptop, false, 80))
		if err == nil {
			c.Close()
		}
		return errors.As(err, &denied) && denied.Port == 80
	})
	t.Logf("with shields up: %v", denied)
	laptop.do("shields", map[string]any{"On": false}, nil)
	until(t, "the stock node to lower its shields", func() bool {
		r, err := ours.fetch("http://"+port(laptop, false, 80)+"/whois", 0)
		return err == nil && r.Status == 200
	})
}

func timeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// Who may not see a node has no peer of that name, and the stock node that is
// seen by one alone is denied by nobody else.
func TestStockSeesOnlyWhomItMay(t *testing.T) {
	m := meshtest.Start(t, `{
		"tagOwners": {"tag:a": [], "tag:s": [], "tag:x": []},
		"acls": [{"action": "accept", "src": ["tag:s"], "dst": ["tag:a:*"]}]}`)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	hidden := stockOf(t, m, "hidden", []string{"tag:x"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	phone := stockOf(t, m, "phone", []string{"tag:a"}, nil)
	know(t, laptop, ours)
	know(t, laptop, phone)
	whoAmI(t, laptop, ours, false)
	// An answer to a datagram comes in without a rule that lets in what it
	// answers; but clients of 1.90 drop it, from wherever it comes.
	var answers []string
	for _, to := range []member{ours, phone} {
		answer, _ := laptop.datagram(port(to, false, 7), "hello", 4)
		answers = append(answers, answer)
	}
	if answers[0] != answers[1] {
		t.Errorf("answers by UDP from ours and stock: %q", answers)
	}
	t.Logf("answers by UDP from ours and stock: %q", answers)
	if st := laptop.status(); len(st.Peer) != 2 {
		t.Errorf("laptop sees %d peers", len(st.Peer))
	}
	if st := hidden.status(); len(st.Peer) != 0 {
		t.Errorf("hidden sees %d peers", len(st.Peer))
	}
	if err := hidden.try("open", map[string]any{"Name": "x", "Addr": port(ours, false, 7), "Seconds": 2}, nil); err == nil {
		t.Error("hidden reached a node that it does not see")
	}
}
