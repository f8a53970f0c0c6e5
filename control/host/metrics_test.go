package host

import (
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"mesh/control/admin"
	"mesh/control/server"
)

// startHost starts a server with all on free ports until the test ends.
func startHost(t *testing.T, change func(*Config)) *Host {
	t.Helper()
	dir, err := os.MkdirTemp("", "m") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := Config{DataDir: filepath.Join(dir, "d"), Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", Metrics: "127.0.0.1:0", Pprof: true}
	if change != nil {
		change(&cfg)
	}
	h, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

var web = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func fetch(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// What is served is what Prometheus reads, has what operators need, and gives
// away nothing.
func TestMetrics(t *testing.T) {
	h := startHost(t, nil)
	c := admin.NewClient(h.Socket())
	if _, err := c.CreateUser(t.Context(), "alice@secret.example"); err != nil {
		t.Fatal(err)
	}
	key, err := c.CreateKey(t.Context(), admin.KeyCreate{User: "alice@secret.example"})
	if err != nil {
		t.Fatal(err)
	}
	status, text := fetch(t, web, "http://"+h.MetricsAddr()+"/metrics")
	if status != 200 {
		t.Fatalf("status %d: %s", status, text)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"mesh_nodes", "mesh_nodes_connected", "mesh_users", "mesh_map_messages_total", "mesh_map_bytes_total", "mesh_map_seconds",
		"mesh_map_queue_peers", "mesh_store_seconds", "mesh_relay_clients", "mesh_relay_bytes_in_total", "mesh_relay_bytes_out_total",
		"go_goroutines", "process_resident_memory_bytes",
	} {
		if families[name] == nil && (runtime.GOOS == "linux" || !strings.HasPrefix(name, "process_")) {
			t.Errorf("%s is not there", name)
		}
	}
	if got := families["mesh_users"].Metric[0].Gauge.GetValue(); got != 1 {
		t.Errorf("%v users, want 1", got)
	}
	if n := families["mesh_store_seconds"]; len(n.Metric) != 2 || n.Metric[0].Histogram.GetSampleCount() == 0 {
		t.Errorf("store: %v", n)
	}
	for name, f := range families {
		if strings.HasPrefix(name, "mesh_") && f.GetHelp() == "" {
			t.Errorf("%s has no help text", name)
		}
	}
	for _, secret := range []string{"alice", "secret.example", key.Secret, h.Key().String()} {
		if strings.Contains(text, secret) {
			t.Errorf("the metrics tell of %q", secret)
		}
	}
	// Only there, and nothing else is.
	if status, _ := fetch(t, web, h.URL()+"/metrics"); status != 404 {
		t.Errorf("metrics on the port for nodes: status %d", status)
	}
	for _, path := range []string{"/key?v=131", "/v1/status", "/debug/pprof/heap", "/"} {
		if status, _ := fetch(t, web, "http://"+h.MetricsAddr()+path); status != 404 {
			t.Errorf("%s at the address of the metrics: status %d", path, status)
		}
	}
}

func TestHealth(t *testing.T) {
	h := startHost(t, nil)
	for _, base := range []string{"http://" + h.MetricsAddr(), h.URL()} {
		if status, text := fetch(t, web, base+"/healthz"); status != 200 || !strings.Contains(text, `"ok"`) {
			t.Errorf("%s/healthz: %d %s", base, status, text)
		}
		status, text := fetch(t, web, base+"/readyz")
		var got server.Health
		if err := json.Unmarshal([]byte(text), &got); err != nil || status != 200 || !got.Ready || got.Checks["store"] != "ok" || !strings.Contains(got.Checks["policy"], "there is none") {
			t.Errorf("%s/readyz: %d %s", base, status, text)
		}
	}
}

// Profiles are for the user that runs the server, and end with it.
func TestPprof(t *testing.T) {
	h := startHost(t, nil)
	path := filepath.Join(filepath.Dir(h.Socket()), PprofName)
	if fi, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && fi.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v, %v", fi, err)
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	if status, text := fetch(t, c, "http://pprof/debug/pprof/goroutine?debug=1"); status != 200 || !regexp.MustCompile(`goroutine profile: total \d+`).MatchString(text) {
		t.Errorf("goroutines: %d %q", status, text)
	}
	if status, text := fetch(t, c, "http://pprof/debug/pprof/heap"); status != 200 || !strings.HasPrefix(text, "\x1f\x8b") {
		t.Errorf("heap: %d", status)
	}
	if status, _ := fetch(t, c, "http://pprof/debug/pprof/nosuch"); status != 404 {
		t.Errorf("no such profile: %d", status)
	}
	done := make(chan struct{})
	started := make(chan struct{})
	go func() {
		defer close(done)
		resp, err := c.Get("http://pprof/debug/pprof/trace?seconds=3600")
		close(started)
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	<-started
	h.Close()
	<-done
	if _, err := os.Stat(path); !os.IsNotExist(err) && err == nil {
		t.Errorf("the socket stays: %v", fs.ErrExist)
	}
}
