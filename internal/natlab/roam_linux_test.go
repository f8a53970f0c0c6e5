package natlab

import (
	"slices"
	"testing"

	"mesh/control/admin"
	"mesh/internal/meshtest"
)

// A node that moves to another network tells control soon where it is: it does not
// wait until its connection from the old one is found to be dead.
func TestControlHearsOfRoaming(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.at(place(Home), "a")
	w.node("na", h)
	other := w.Router("other", Home)
	client := admin.NewClient(w.ready.Socket)
	where := func() (at []string) {
		n, err := client.Node(t.Context(), "na")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range n.Endpoints {
			at = append(at, e.Addr().String())
		}
		return at
	}
	meshtest.Until(t, "control to know where the node is", func() bool { return slices.Contains(where(), h.router.WAN.String()) })
	h.Move(other)
	meshtest.Until(t, "control to know where the node is now", func() bool {
		at := where()
		return slices.Contains(at, other.WAN.String()) && slices.Contains(at, h.IPv4.String())
	})
}
