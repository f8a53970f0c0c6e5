package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mesh/control/wire"
)

// meters are what the server counts as it goes. No label takes a value that
// somebody outside chooses: they are the refusals of package wire and words of
// this file.
type meters struct {
	registrations *prometheus.CounterVec // by result
	denials       *prometheus.CounterVec // by where and why
	mapMessages   prometheus.Counter
	mapBytes      prometheus.Counter
	mapSeconds    prometheus.Histogram
	storeSeconds  *prometheus.HistogramVec // by op
	storeErrors   *prometheus.CounterVec   // by op
}

// Where requests are denied.
const (
	atUpgrade  = "upgrade"
	atRegister = "register"
	atMap      = "map"
	atRelay    = "relay"
	atPublic   = "public"
	atMachine  = "machine" // inside the Noise channel
)

// Why they are, besides the codes of package wire.
const (
	denyRate = "rate-limit" // 429
	denyBusy = "busy"       // 503
	denyFail = "error"      // of the server
)

func newMeters() *meters {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	return &meters{
		registrations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_registrations_total",
			Help: "Answers to machines that asked to be a node, by result: accepted, login, again, or why not."}, []string{"result"}),
		denials: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_denials_total",
			Help: "Requests that were refused, by where and why."}, []string{"at", "reason"}),
		mapMessages: counter("mesh_map_messages_total", "Messages on map streams, keep-alives included."),
		mapBytes:    counter("mesh_map_bytes_total", "Bytes of these messages as sent."),
		mapSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "mesh_map_seconds",
			Help:    "From the moment a map stream learns of a change until its message has left.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}}),
		storeSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "mesh_store_seconds",
			Help:    "Duration of operations of the database.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}}, []string{"op"}),
		storeErrors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_store_errors_total",
			Help: "Operations of the database that failed, refusals and missing rows included."}, []string{"op"}),
	}
}

func (m *meters) all() []prometheus.Collector {
	return []prometheus.Collector{m.registrations, m.denials, m.mapMessages, m.mapBytes, m.mapSeconds, m.storeSeconds, m.storeErrors}
}

// denied counts a refusal; err is why, or reason is if err has no code.
func (m *meters) denied(at string, err error, reason string) {
	if code := wire.CodeOf(err); code != "" {
		reason = string(code)
	}
	m.denials.WithLabelValues(at, reason).Inc()
}

// registered counts an answer to a registration.
func (m *meters) registered(resp *wire.RegisterResponse) {
	result := "again" // with another node key
	switch {
	case resp.MeshCode != "":
		result = string(resp.MeshCode)
	case resp.MachineAuthorized:
		result = "accepted"
	case resp.AuthURL != "":
		result = "login"
	}
	m.registrations.WithLabelValues(result).Inc()
}

// stored notes an operation of the store.
func (m *meters) stored(write bool, took time.Duration, err error) {
	op := "read"
	if write {
		op = "write"
	}
	m.storeSeconds.WithLabelValues(op).Observe(took.Seconds())
	if err != nil {
		m.storeErrors.WithLabelValues(op).Inc()
	}
}

// sent counts a message of a map stream.
func (m *meters) sent(bytes int) {
	m.mapMessages.Inc()
	m.mapBytes.Add(float64(bytes))
}

// gauge is something that is looked up when somebody asks.
type gauge struct {
	desc *prometheus.Desc
	get  func(*gaugeValues) float64
}

// gaugeValues are the server's state at one moment.
type gaugeValues struct {
	nodes, connected, expired, users, streams, pending, deepest, unsaved, logins, relays, members, sources int
	policy                                                                                                 int64
	strangers, handshakes                                                                                  int
}

func newGauge(name, help string, get func(*gaugeValues) float64) gauge {
	return gauge{prometheus.NewDesc(name, help, nil, nil), get}
}

var gauges = []gauge{
	newGauge("mesh_nodes", "Registered nodes.", func(v *gaugeValues) float64 { return float64(v.nodes) }),
	newGauge("mesh_nodes_connected", "Nodes with an open map stream.", func(v *gaugeValues) float64 { return float64(v.connected) }),
	newGauge("mesh_nodes_refused", "Nodes whose key has expired or whose user is suspended.", func(v *gaugeValues) float64 { return float64(v.expired) }),
	newGauge("mesh_users", "Users.", func(v *gaugeValues) float64 { return float64(v.users) }),
	newGauge("mesh_map_streams_behind", "Map streams that have something to send.", func(v *gaugeValues) float64 { return float64(v.streams) }),
	newGauge("mesh_map_queue_peers", "Peers that map streams still have to tell of, all together.", func(v *gaugeValues) float64 { return float64(v.pending) }),
	newGauge("mesh_map_queue_peers_max", "Peers that the stream furthest behind has to tell of.", func(v *gaugeValues) float64 { return float64(v.deepest) }),
	newGauge("mesh_unsaved_nodes", "Nodes whose reported state waits to be stored.", func(v *gaugeValues) float64 { return float64(v.unsaved) }),
	newGauge("mesh_logins_pending", "Machines that wait for an administrator.", func(v *gaugeValues) float64 { return float64(v.logins) }),
	newGauge("mesh_relays_connected", "Relay processes that are connected.", func(v *gaugeValues) float64 { return float64(v.relays) }),
	newGauge("mesh_member_queue_keys", "Keys that relays still have to hear of, all together.", func(v *gaugeValues) float64 { return float64(v.members) }),
	newGauge("mesh_policy_version", "Version of the policy in force, 0 = none.", func(v *gaugeValues) float64 { return float64(v.policy) }),
	newGauge("mesh_strangers", "Connections of machines without a node.", func(v *gaugeValues) float64 { return float64(v.strangers) }),
	newGauge("mesh_handshakes", "Noise handshakes under way.", func(v *gaugeValues) float64 { return float64(v.handshakes) }),
	newGauge("mesh_limited_sources", "Source addresses that rate limits remember.", func(v *gaugeValues) float64 { return float64(v.sources) }),
}

// collector gives the server's figures to a registry.
type collector struct{ s *Server }

// Collector returns the server's metrics. They hold no names, keys or addresses.
func (s *Server) Collector() prometheus.Collector { return collector{s} }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range c.s.meters.all() {
		m.Describe(ch)
	}
	for _, g := range gauges {
		ch <- g.desc
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, m := range c.s.meters.all() {
		m.Collect(ch)
	}
	v := c.s.gaugeValues()
	for _, g := range gauges {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.get(&v))
	}
}

func (s *Server) gaugeValues() (v gaugeValues) {
	v.sources = max(s.limit.size(), s.requests.size())
	v.strangers, v.handshakes = s.transport.unknown.Taken(), len(s.transport.handshakes)
	s.mu.Lock()
	defer s.mu.Unlock()
	v.nodes, v.users, v.unsaved, v.policy = len(s.nodes.byID), len(s.users), len(s.unsaved), s.policy.Version
	for _, n := range s.nodes.byID {
		if n.expired {
			v.expired++
		}
		if n.stream == nil {
			continue
		}
		v.connected++
		if len(n.stream.wake) > 0 {
			v.streams++
		}
		peers := len(n.stream.pending.peers)
		v.pending += peers
		v.deepest = max(v.deepest, peers)
	}
	for sub := range s.members {
		v.members += len(sub.pending)
	}
	s.logins.prune(s.cfg.Now())
	for _, l := range s.logins.byCode {
		if l.state == loginPending {
			v.logins++
		}
	}
	v.relays = s.relaysConnected()
	return v
}
