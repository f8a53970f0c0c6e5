package host

import (
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
)

// serveMetrics answers /metrics, and /healthz and /readyz: a relay is ready when
// it knows members, from whenever.
func (r *Relay) serveMetrics() error {
	health := http.NewServeMux()
	health.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	health.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if r.Members() == 0 && !r.control.Load() {
			http.Error(w, "no members: nothing was heard from the control server yet", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	gauge := func(name, help string, get func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mesh_relay_" + name, Help: help}, get)
	}
	ln, srv, err := openMetrics(r.cfg.Metrics, health, r.log,
		relayCollector{r.relay.Stats},
		gauge("members", "Nodes that the relay admits.", func() float64 { return float64(r.Members()) }),
		gauge("control_connected", "1 while the control server names the members.", func() float64 {
			if r.control.Load() {
				return 1
			}
			return 0
		}))
	if err != nil {
		return err
	}
	r.metrics, r.addr = srv, ln.Addr().String()
	r.wg.Go(func() {
		if err := srv.Serve(ln); err != nil && r.ctx.Err() == nil {
			r.fail(fmt.Errorf("metrics: %w", err))
		}
	})
	return nil
}

// MetricsAddr is the TCP address that metrics are served at, "" if they are not.
func (r *Relay) MetricsAddr() string { return r.addr }
