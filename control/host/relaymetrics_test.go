package host

import (
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"mesh/control/admin"
)

// A relay of its own tells what it does, and whether it can do anything.
func TestRelayMetrics(t *testing.T) {
	h := startHost(t, func(c *Config) { c.NoRelay = true })
	key, err := admin.NewClient(h.Socket()).CreateKey(t.Context(), admin.KeyCreate{Relay: true})
	if err != nil {
		t.Fatal(err)
	}
	start := func(control string) *Relay {
		r, err := StartRelay(RelayConfig{DataDir: t.TempDir(), Listen: "127.0.0.1:0", STUN: "off", Metrics: "127.0.0.1:0",
			ControlURL: control, RelayKey: key.Secret})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	r := start(h.URL())
	<-r.Announced()
	status, text := fetch(t, web, "http://"+r.MetricsAddr()+"/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if status != 200 || err != nil {
		t.Fatalf("%d %v: %s", status, err, text)
	}
	for _, name := range []string{"mesh_relay_clients", "mesh_relay_members", "mesh_relay_bytes_out_total", "mesh_relay_dropped_total",
		"mesh_relay_unknown_total", "mesh_relay_forwarded_out_total", "mesh_relay_mesh_peers", "go_goroutines"} {
		if families[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	if got := families["mesh_relay_control_connected"].GetMetric()[0].GetGauge().GetValue(); got != 1 {
		t.Errorf("control %v", got)
	}
	if strings.Contains(text, key.Secret) {
		t.Error("the relay key is in it")
	}
	alone := start("http://127.0.0.1:9")
	for r, want := range map[*Relay]int{r: 200, alone: 503} {
		if status, text := fetch(t, web, "http://"+r.MetricsAddr()+"/readyz"); status != want {
			t.Errorf("ready: %d %s, want %d", status, text, want)
		}
		if status, _ := fetch(t, web, "http://"+r.MetricsAddr()+"/healthz"); status != 200 {
			t.Errorf("health: %d", status)
		}
	}
}
