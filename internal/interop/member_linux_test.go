package interop

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh/internal/meshtest"
)

// member is a node of a mesh, stock or ours.
type member interface {
	label() string
	at(six bool) netip.Addr
	knows(label string) bool
	pathTo(other member) string
	fetch(url string, post int64) (httpResult, error)
	echo(addr string, size int64) (sum string, err error)
	datagram(addr, text string, tries int) (answer string, err error) // one try each half second
}

// until waits until ok returns true, asking less often than meshtest.Until:
// each question may go to another process.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !happens(ok) {
		t.Fatalf("waited %v for %s", meshtest.Patience, what)
	}
}

// happens is until for other goroutines than the test's: it reports whether ok
// returned true in time.
func happens(ok func() bool) bool {
	deadline := time.After(meshtest.Patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			return false
		case <-tick.C:
		}
	}
	return true
}

// know waits until each of the members could send packets to all others. A
// stock node that dials earlier fails, or loses the first handshake and tries
// again after five seconds.
func know(t testing.TB, members ...member) {
	t.Helper()
	for _, a := range members {
		for _, b := range members {
			if a != b {
				until(t, fmt.Sprintf("%s to know %s", a.label(), b.label()), func() bool { return a.knows(b.label()) })
			}
		}
	}
}

// port joins a member's address of a family with a port.
func port(m member, six bool, port int) string {
	return net.JoinHostPort(m.at(six).String(), fmt.Sprint(port))
}

// whoAmI asks the HTTP service of a member who the asking one is.
func whoAmI(t testing.TB, from, to member, six bool) (id identity) {
	t.Helper()
	r, err := from.fetch("http://"+port(to, six, 80)+"/whois", 0)
	if err != nil {
		t.Fatalf("%s asks %s: %v", from.label(), to.label(), err)
	}
	if err := json.Unmarshal([]byte(r.Body), &id); err != nil {
		t.Fatalf("%s asks %s: %v in %q", from.label(), to.label(), err, r.Body)
	}
	return id
}

// talk sends HTTP, TCP and UDP from one member to another over one family, and
// checks what comes back.
func talk(t testing.TB, from, to member, six bool) {
	t.Helper()
	where := fmt.Sprintf("%s to %s (%s)", from.label(), to.label(), to.at(six))
	if id := whoAmI(t, from, to, six); label(id.Name) != from.label() {
		t.Errorf("%s: was taken for %q", where, id.Name)
	}
	const size = 100_000
	if sum, err := from.echo(port(to, six, 7), size); err != nil || sum != sumOf(size) {
		t.Errorf("%s: TCP echo: sum %s, %v", where, sum, err)
	}
	if got, err := from.datagram(port(to, six, 7), where, 20); err != nil || got != where {
		t.Errorf("%s: UDP echo: %q, %v", where, got, err)
	}
}

// label is the first label of a name.
func label(name string) string { return stockPeer{DNSName: name}.label() }

// transfer moves bytes both ways by HTTP, and checks the sums.
func transfer(t testing.TB, from, to member, size int64) {
	t.Helper()
	url := "http://" + port(to, false, 80)
	if r, err := from.fetch(fmt.Sprintf("%s/bytes?n=%d", url, size), 0); err != nil || r.SHA256 != sumOf(size) {
		t.Errorf("%s reads from %s: %d bytes, %v", from.label(), to.label(), r.Bytes, err)
	}
	if r, err := from.fetch(url+"/sum", size); err != nil || r.Body != sumOf(size) {
		t.Errorf("%s writes to %s: %q, %v", from.label(), to.label(), r.Body, err)
	}
}

// contains reports whether what a stock node said of a failure has the text of
// an error of ours in it.
func contains(got, want error) bool { return strings.Contains(got.Error(), want.Error()) }

// userKey is how a stock status names a user.
func userKey(id int64) string { return fmt.Sprint(id) }
