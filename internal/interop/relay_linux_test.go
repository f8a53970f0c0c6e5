package interop

import (
	"path/filepath"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// startRelay runs a relay with STUN as `mesh relay` does, until the test ends.
func startRelay(t testing.TB, m *meshtest.Mesh, region int, options ...func(*host.RelayConfig)) *host.Relay {
	t.Helper()
	key, err := m.Admin.CreateKey(t.Context(), admin.KeyCreate{Relay: true})
	if err != nil {
		t.Fatal(err)
	}
	cfg := host.RelayConfig{
		DataDir: filepath.Join(t.TempDir(), "relay"), Listen: "127.0.0.1:0", STUN: "127.0.0.1:0",
		ControlURL: m.Host.URL(), RelayKey: key.Secret, Region: region, Logger: meshtest.Logger(t),
	}
	for _, o := range options {
		o(&cfg)
	}
	r, err := host.StartRelay(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	select {
	case <-r.Announced():
	case err := <-r.Failed():
		t.Fatal(err)
	case <-time.After(meshtest.Patience):
		t.Fatal("the relay was not announced")
	}
	return r
}

// Stock nodes use a relay that is a process of its own, learn by a delta of a
// relay that appears, and move to it when the old one is taken away, or ends: then
// they have moved before it does.
func TestStockUsesOurRelayProcess(t *testing.T) {
	t.Parallel()
	const drain = 20 * time.Second
	m := meshtest.Start(t, openPolicy, func(c *host.Config) { c.NoRelay = true })
	first := startRelay(t, m, 910)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, stockRelayOnly)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, stockRelayOnly)
	ours := startAgent(t, m, "agent", []string{"tag:a"}, relayOnly)
	know(t, laptop, phone, ours)
	polls := laptop.polls()
	by := func(region int) {
		t.Helper()
		until(t, "traffic by the relay", func() bool {
			r, err := laptop.ping(ours.at(false), "disco")
			return err == nil && r.DERPRegionID == region
		})
		talk(t, laptop, ours, false)
		talk(t, ours, laptop, true)
		talk(t, phone, laptop, false)
	}
	by(910)
	second := startRelay(t, m, 911, func(c *host.RelayConfig) { c.Drain = drain })
	both := func() {
		t.Helper()
		until(t, "the server to list both relays", func() bool {
			relays, err := m.Admin.Relays(t.Context())
			return err == nil && len(relays) == 2
		})
	}
	both()
	if err := m.Admin.RemoveRelay(t.Context(), "910"); err != nil {
		t.Fatal(err)
	}
	first.Close()
	by(911)
	startRelay(t, m, 912)
	both()
	began := time.Now()
	second.Close()
	if took := time.Since(began); took >= drain {
		t.Errorf("the relay ended after %v with nodes at it", took)
	} else {
		t.Logf("drained in %v", took)
	}
	by(912)
	if n := laptop.polls(); n != polls {
		t.Errorf("%d map polls, were %d", n, polls)
	}
}
