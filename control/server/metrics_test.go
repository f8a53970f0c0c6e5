package server

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"mesh/control/store"
	"mesh/control/wire"
)

// What nodes do shows in the metrics; what strangers make up becomes no label.
func TestCollector(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(w.s.Collector())
	a, b := w.machine().join(w.key(store.Key{})), w.machine().join(w.key(store.Key{}))
	na := a.poll(nil)
	b.poll(nil)
	na.until(t, "b", func() bool { return len(na.peers) == 1 })
	for _, key := range []string{"mesh-auth-1-nonsense", "who=\"me\"\n"} {
		m := w.machine()
		m.refused(m.registerRequest(key), wire.CodeAuthKeyUnknown)
	}
	c := w.machine()
	c.lite(nil)
	if err := w.s.ExpireNode(t.Context(), "test", "agent-1", w.s.cfg.Now()); err != nil {
		t.Fatal(err)
	}
	want := `
# HELP mesh_denials_total Requests that were refused, by where and why.
# TYPE mesh_denials_total counter
mesh_denials_total{at="map",reason="node-unknown"} 1
mesh_denials_total{at="register",reason="auth-key-unknown"} 2
# HELP mesh_registrations_total Answers to machines that asked to be a node, by result: accepted, login, again, or why not.
# TYPE mesh_registrations_total counter
mesh_registrations_total{result="accepted"} 2
mesh_registrations_total{result="auth-key-unknown"} 2
# HELP mesh_nodes Registered nodes.
# TYPE mesh_nodes gauge
mesh_nodes 2
# HELP mesh_nodes_refused Nodes whose key has expired or whose user is suspended.
# TYPE mesh_nodes_refused gauge
mesh_nodes_refused 1
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "mesh_denials_total", "mesh_registrations_total", "mesh_nodes", "mesh_nodes_refused"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(reg, "mesh_map_bytes_total", "mesh_map_seconds", "mesh_store_seconds", "mesh_nodes_connected"); err != nil || n != 5 {
		t.Errorf("%d of the others, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

// A server whose store takes no writes says so, without telling where it is.
func TestNotReady(t *testing.T) {
	w := newWorld(t, nil)
	ready := func() (int, Health, string) {
		rec := httptest.NewRecorder()
		w.s.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/readyz", nil))
		var h Health
		if err := json.Unmarshal(rec.Body.Bytes(), &h); err != nil {
			t.Fatal(err)
		}
		return rec.Code, h, rec.Body.String()
	}
	if code, h, _ := ready(); code != 200 || !h.Ready {
		t.Errorf("at first: %d %+v", code, h)
	}
	w.store.Close()
	w.s.readiness.at = w.s.readiness.at.Add(-healthFor)
	code, h, text := ready()
	if code != 503 || h.Ready || h.Checks["store"] != "failed" || strings.Contains(text, w.path) {
		t.Errorf("without a store: %d %s", code, text)
	}
	rec := httptest.NewRecorder()
	w.s.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/healthz", nil))
	if rec.Code != 200 {
		t.Errorf("it lives all the same: %d", rec.Code)
	}
}
