package host

import (
	"fmt"
	"log"
	"net"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"mesh/control/server"
	"mesh/derp/relay"
)

// serveMetrics answers /metrics, /healthz and /readyz at Config.Metrics, if that
// is set.
func (h *Host) serveMetrics() error {
	if h.cfg.Metrics == "" {
		return nil
	}
	more := []prometheus.Collector{h.server.Collector()}
	if h.relay != nil {
		more = append(more, relayCollector{h.relay.Stats})
	}
	ln, srv, err := openMetrics(h.cfg.Metrics, h.server.HealthHandler(), h.log, more...)
	if err != nil {
		return err
	}
	h.metrics = ln.Addr().String()
	h.wg.Go(func() { h.fail("metrics", srv.Serve(ln)) })
	h.onClose(func() { srv.Close() })
	return nil
}

// openMetrics listens at addr and makes a server of what the collectors gather
// and of what a process tells about itself, and of health for other paths.
func openMetrics(addr string, health http.Handler, logger *zap.Logger, collected ...prometheus.Collector) (net.Listener, *http.Server, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, nil, fmt.Errorf("listen for metrics: %w; choose another address with --metrics", err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reg.MustRegister(collected...)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.Handle("GET /", health)
	srv := server.HTTPServer(http.MaxBytesHandler(mux, 0))
	srv.ErrorLog = log.New(debugWriter{logger}, "", 0)
	return ln, srv, nil
}

// MetricsAddr is the TCP address that metrics are served at, "" if they are not.
func (h *Host) MetricsAddr() string { return h.metrics }

// relayCollector gives a relay's figures to a registry.
type relayCollector struct{ stats func() relay.Stats }

// relayMetric is one of them.
type relayMetric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	get  func(*relay.Stats) float64
}

func relayGauge(name, help string, get func(*relay.Stats) float64) relayMetric {
	return relayMetric{prometheus.NewDesc("mesh_relay_"+name, help, nil, nil), prometheus.GaugeValue, get}
}

func relayCounter(name, help string, get func(*relay.Stats) uint64) relayMetric {
	return relayMetric{prometheus.NewDesc("mesh_relay_"+name+"_total", help, nil, nil), prometheus.CounterValue,
		func(s *relay.Stats) float64 { return float64(get(s)) }}
}

var relayMetrics = []relayMetric{
	relayGauge("clients", "Connections that have logged in.", func(s *relay.Stats) float64 { return float64(s.Clients) }),
	relayGauge("keys", "Different keys among them.", func(s *relay.Stats) float64 { return float64(s.Keys) }),
	relayGauge("homes", "Connections of clients whose home this relay is.", func(s *relay.Stats) float64 { return float64(s.Homes) }),
	relayGauge("pending", "Connections that have not logged in.", func(s *relay.Stats) float64 { return float64(s.Pending) }),
	relayGauge("draining", "1 while clients are asked to move elsewhere.", func(s *relay.Stats) float64 {
		if s.Draining {
			return 1
		}
		return 0
	}),
	relayGauge("mesh_peers", "Relays of the region that this one forwards to.", func(s *relay.Stats) float64 { return float64(s.MeshPeers) }),
	relayGauge("mesh_clients", "Keys that are connected to those.", func(s *relay.Stats) float64 { return float64(s.MeshClients) }),
	relayCounter("logins", "Logins that succeeded.", func(s *relay.Stats) uint64 { return s.Accepted }),
	relayCounter("refused", "Logins of keys that are no members.", func(s *relay.Stats) uint64 { return s.Refused }),
	relayCounter("evicted", "Connections cut or turned away because too many were pending.", func(s *relay.Stats) uint64 { return s.Evicted }),
	relayCounter("violations", "Connections closed because the client broke the protocol.", func(s *relay.Stats) uint64 { return s.Violations }),
	relayCounter("packets_in", "Packets received from clients.", func(s *relay.Stats) uint64 { return s.PacketsIn }),
	relayCounter("bytes_in", "Bytes of packets received from clients.", func(s *relay.Stats) uint64 { return s.BytesIn }),
	relayCounter("packets_out", "Packets queued for clients.", func(s *relay.Stats) uint64 { return s.PacketsOut }),
	relayCounter("bytes_out", "Bytes of packets queued for clients.", func(s *relay.Stats) uint64 { return s.BytesOut }),
	relayCounter("unknown", "Packets dropped because their receiver is not connected.", func(s *relay.Stats) uint64 { return s.Unknown }),
	relayCounter("dropped", "Packets dropped because the queue of their receiver was full.", func(s *relay.Stats) uint64 { return s.Dropped }),
	relayCounter("mesh_full", "Clients of other relays that were not noted, and relays that fell behind with ours.", func(s *relay.Stats) uint64 { return s.MeshFull }),
	{prometheus.NewDesc("mesh_relay_paused_seconds_total", "How long clients were kept from sending since they were above their rate.", nil, nil),
		prometheus.CounterValue, func(s *relay.Stats) float64 { return s.Paused.Seconds() }},
	relayCounter("forwarded_in", "Packets that other relays of the region forwarded to clients here.", func(s *relay.Stats) uint64 { return s.ForwardedIn }),
	relayCounter("forwarded_out", "Packets queued for other relays of the region.", func(s *relay.Stats) uint64 { return s.ForwardedOut }),
	relayCounter("forwarded_dropped", "Packets dropped because the queue of such a relay was full.", func(s *relay.Stats) uint64 { return s.ForwardedDropped }),
}

// Describe implements prometheus.Collector.
func (c relayCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range relayMetrics {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c relayCollector) Collect(ch chan<- prometheus.Metric) {
	st := c.stats()
	for _, m := range relayMetrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.get(&st))
	}
}
