package host

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/derp/relay"
	"mesh/identity"
	"mesh/internal/backoff"
)

// RelayConfig says what StartRelay starts.
type RelayConfig struct {
	DataDir    string // keys and the cached members; made if missing
	Listen     string // TCP address of the relay; required
	STUN       string // UDP address of STUN; "" = Listen's host and DefaultSTUNPort, "off" = none
	Host       string // name or address at which nodes reach Listen; "" = Listen's
	ControlURL string
	ControlKey identity.MachinePublic // pin, zero = none
	RelayKey   string                 // secret from `mesh key create --relay`
	Region     int                    // 1–65535; 0 = 901
	RegionName string                 // "" = "relay REGION"
	// TLSCert and TLSKey are PEM files; without them the relay makes a
	// certificate, which nodes pin.
	TLSCert, TLSKey string
	// Rate bounds what one node may send through the relay, in bytes a second;
	// 0 = no limit.
	Rate int
	// Drain is how long Close serves nodes on while they move to another relay;
	// it ends as soon as they have. 0 = not at all.
	Drain time.Duration
	// Metrics is the TCP address where /metrics, /healthz and /readyz are served;
	// "" = nowhere.
	Metrics string
	// OnState, if not nil, is called with nil whenever the control server has
	// named the members, and with the reason whenever it cannot be reached or
	// refuses the relay. Calls come one after the other.
	OnState func(error)
	Logger  *zap.Logger // nil = silent
}

// Relay is a relay process. It admits the members that the control server
// names, remembers them on disk and goes on with what it knows while the
// control server is away. It never admits whom it does not know.
type Relay struct {
	cfg    RelayConfig
	log    *zap.Logger
	relay  *relay.Server
	files  *identity.FileStore
	client *control.Client
	region *wire.DERPRegion
	key    identity.NodePublic

	mu      sync.Mutex // guards what follows
	members map[identity.NodePublic]struct{}
	mesh    meshState

	saving  sync.Mutex    // one saves at a time
	unsaved chan struct{} // capacity 1: the members on disk are not the newest

	stun      *stunServer // nil if off
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	failed    chan error
	announced chan struct{} // closed when the control server first named the members
	shutdown  sync.Once

	metrics *http.Server // nil if off
	addr    string       // of metrics
	control atomic.Bool  // the control server names the members now
}

const membersName = "members.json"

// errLeft ends the request that takes a relay out of the map.
var errLeft = errors.New("left")

// saveEvery is the shortest time between two savings of members that come and go
// one by one. A change after a longer time is saved at once.
const saveEvery = 250 * time.Millisecond

// StartRelay opens the data directory and the sockets and returns. Whether
// the control server accepts the relay, Announced and Failed tell.
func StartRelay(cfg RelayConfig) (_ *Relay, err error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Region == 0 {
		cfg.Region = embeddedRegion + 1
	}
	if cfg.RegionName == "" {
		cfg.RegionName = fmt.Sprintf("relay %d", cfg.Region)
	}
	r := &Relay{
		cfg:       cfg,
		log:       cfg.Logger,
		members:   map[identity.NodePublic]struct{}{},
		unsaved:   make(chan struct{}, 1),
		failed:    make(chan error, 1),
		announced: make(chan struct{}),
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	switch {
	case cfg.DataDir == "":
		return nil, errors.New("no data directory")
	case cfg.RelayKey == "":
		return nil, errors.New("no relay key: create one with `mesh key create --relay`")
	case cfg.Region < 1 || cfg.Region > 65535:
		return nil, fmt.Errorf("region %d: want a number between 1 and 65535", cfg.Region)
	}
	if err := makeDataDir(cfg.DataDir); err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen for nodes: %w; choose another address with --listen", err)
	}
	defer func() {
		if err != nil {
			ln.Close()
		}
	}()
	addr := ln.Addr().(*net.TCPAddr).AddrPort()
	name := cfg.Host
	if name == "" {
		if addr.Addr().IsUnspecified() {
			return nil, fmt.Errorf("nodes need to know where the relay is: listening on all addresses (%s) does not say; give --host", addr)
		}
		name = addr.Addr().Unmap().String()
	}
	id, err := relayIdentityIn(cfg.DataDir, name, cfg.TLSCert != "")
	if err != nil {
		return nil, err
	}
	get := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &id.cert, nil }
	if cfg.TLSCert != "" {
		f, err := openFileCert(cfg.TLSCert, cfg.TLSKey, r.log)
		if err != nil {
			return nil, err
		}
		get = f.get
	}
	r.key = id.key.Public()
	if r.files, err = openFiles(cfg.DataDir); err != nil {
		return nil, err
	}
	r.loadMembers()
	if cfg.STUN != "off" {
		if r.stun, err = startSTUN(cfg.STUN, cfg.Listen, r.log, r.fail); err != nil {
			return nil, err
		}
	}
	r.region = newRegion(cfg.Region, fmt.Sprintf("r%d", cfg.Region), cfg.RegionName, name, int(addr.Port()), r.stun.port(), id.pin)
	machine, err := machineKeyIn(r.files)
	if err != nil {
		return nil, err
	}
	r.client, err = control.New(control.Config{URL: cfg.ControlURL, ServerKey: cfg.ControlKey, Machine: machine, Logger: r.log})
	if err != nil {
		return nil, err
	}
	if err := r.client.Proven(); err != nil {
		return nil, fmt.Errorf("%w with --control-key", err)
	}
	r.relay = relay.New(relay.Config{Key: id.key, Admit: r.admit, Logger: r.log, BytesPerSecond: cfg.Rate})
	r.loadMesh()
	r.wg.Go(func() {
		if err := r.relay.Serve(ln, relay.TLSConfigFunc(get, r.relay)); err != nil && r.ctx.Err() == nil {
			r.fail(fmt.Errorf("relay: %w", err))
		}
	})
	if cfg.Metrics != "" {
		if err := r.serveMetrics(); err != nil {
			return nil, err
		}
	}
	r.wg.Go(r.follow)
	r.wg.Go(r.keepSaved)
	return r, nil
}

// Announced is closed when the control server has accepted the relay.
func (r *Relay) Announced() <-chan struct{} { return r.announced }

// Failed gives an error when the relay cannot go on, such as a refused key.
func (r *Relay) Failed() <-chan error { return r.failed }

// Region is the number of the relay's region in the relay map.
func (r *Relay) Region() int { return r.cfg.Region }

// STUNAddr is the UDP address that STUN listens on, "" if it is off.
func (r *Relay) STUNAddr() string {
	if r.stun == nil {
		return ""
	}
	return r.stun.pc.LocalAddr().String()
}

// Addr is where nodes reach the relay.
func (r *Relay) Addr() string {
	n := r.region.Nodes[0]
	return net.JoinHostPort(n.HostName, fmt.Sprint(n.DERPPort))
}

// Members is how many nodes the relay admits.
func (r *Relay) Members() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.members)
}

func (r *Relay) fail(err error) {
	select {
	case r.failed <- err:
	default:
	}
}

// Stats tells what the relay does.
func (r *Relay) Stats() relay.Stats { return r.relay.Stats() }

// Close lets nodes move to another relay (RelayConfig.Drain), ends all
// connections and waits until nothing is left running.
func (r *Relay) Close() error {
	r.shutdown.Do(func() {
		r.drain() // control goes on saying who is a member
		r.cancel()
		r.stun.close()
		if r.metrics != nil {
			r.metrics.Close()
		}
		if r.relay != nil {
			r.relay.Close()
		}
		r.wg.Wait()
		r.saveUnsaved()
		if r.client != nil {
			r.client.Close()
		}
		if r.files != nil {
			r.files.Close()
		}
	})
	return nil
}

// drain serves nodes until they have moved. Nodes of ours do when the relay says
// that it goes, others when the map does not name it any more.
func (r *Relay) drain() {
	if r.relay == nil || r.cfg.Drain <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), r.cfg.Drain)
	defer cancel()
	first, done := context.WithTimeout(ctx, r.cfg.Drain/2)
	n := r.relay.Drain(first, r.cfg.Drain, time.Minute)
	done()
	select {
	case <-r.announced:
		err := r.client.Relay(ctx, r.request(true), func(*wire.RelayUpdate) error { return errLeft })
		if !errors.Is(err, errLeft) {
			r.log.Info("the control server does not know that this relay goes", zap.Error(err))
		}
	default: // it never knew this relay
	}
	if n > 0 {
		n = r.relay.Drain(ctx, r.cfg.Drain, time.Minute)
	}
	if n > 0 {
		r.log.Info("relay ends with nodes at home here", zap.Int("connections", n))
	}
}

// request is what the relay says to the control server.
func (r *Relay) request(leaving bool) wire.RelayRequest {
	return wire.RelayRequest{
		Version: wire.CapabilityVersion, RelayKey: r.cfg.RelayKey, NodeKey: r.key, Region: r.region, Leaving: leaving,
	}
}

func (r *Relay) admit(_ context.Context, key identity.NodePublic, _ netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.members[key]; !ok {
		return errNotMember
	}
	return nil
}

// follow keeps the list of members, for ever.
func (r *Relay) follow() {
	var b backoff.Backoff
	var first sync.Once
	for r.ctx.Err() == nil {
		err := r.client.Relay(r.ctx, r.request(false), func(u *wire.RelayUpdate) error {
			b.Reset()
			if u.KeepAlive {
				return nil
			}
			r.update(u)
			if u.Mesh != nil {
				r.setMesh(u.Mesh)
			}
			if u.Full {
				r.control.Store(true)
				first.Do(func() { close(r.announced) })
				r.state(nil)
			}
			return nil
		})
		r.control.Store(false)
		if r.ctx.Err() != nil {
			return
		}
		if refused(err) {
			// Those that were admitted stay; the operator must act.
			r.log.Error("the control server refuses this relay", zap.Error(err))
			r.fail(err)
		} else {
			r.log.Info("no control server, going on with the known members", zap.Error(err), zap.Int("members", r.Members()))
		}
		r.state(err)
		if b.Wait(r.ctx, 0, nil, nil) != nil {
			return
		}
	}
}

// refused reports whether err is the control server's no, which does not pass
// by itself.
func refused(err error) bool {
	var status *control.StatusError
	return wire.CodeOf(err) != "" || errors.Is(err, control.ErrServerKeyMismatch) ||
		errors.As(err, &status) && status.Status/100 == 4 && status.Status != 408 && status.Status != 429
}

func (r *Relay) state(err error) {
	if r.cfg.OnState != nil {
		r.cfg.OnState(err)
	}
}

// update takes what the control server says: who comes is admitted, who goes
// is cut at once, and all is remembered, of a burst of changes the last state.
func (r *Relay) update(u *wire.RelayUpdate) {
	r.mu.Lock()
	var gone []identity.NodePublic
	if u.Full {
		next := make(map[identity.NodePublic]struct{}, len(u.Members))
		for _, k := range u.Members {
			next[k] = struct{}{}
		}
		for k := range r.members {
			if _, stays := next[k]; !stays {
				gone = append(gone, k)
			}
		}
		r.members = next
	} else {
		for _, k := range u.Members {
			r.members[k] = struct{}{}
		}
		for _, k := range u.Removed {
			if _, ok := r.members[k]; ok {
				delete(r.members, k)
				gone = append(gone, k)
			}
		}
	}
	r.mu.Unlock()
	if len(gone) > 0 {
		r.relay.Revoke(gone...)
	}
	if u.Full {
		r.save()
		return
	}
	if len(u.Members)+len(u.Removed) == 0 {
		return
	}
	select {
	case r.unsaved <- struct{}{}:
	default:
	}
}

// keepSaved saves members that come and go.
func (r *Relay) keepSaved() {
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-r.unsaved:
			r.save()
		}
		t := time.NewTimer(saveEvery)
		select {
		case <-r.ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

func (r *Relay) saveUnsaved() {
	select {
	case <-r.unsaved:
		r.save()
	default:
	}
}

// save writes down who is a member.
func (r *Relay) save() {
	r.saving.Lock()
	defer r.saving.Unlock()
	r.mu.Lock()
	all := make([]string, 0, len(r.members))
	for k := range r.members {
		all = append(all, k.String())
	}
	r.mu.Unlock()
	slices.Sort(all)
	b, err := json.Marshal(all)
	if err == nil {
		err = r.files.Write(membersName, b)
	}
	if err != nil {
		r.log.Warn("the members could not be saved; after a restart without control server the relay admits older ones", zap.Error(err))
	}
}

// loadMembers reads who was a member when the relay last heard of it.
func (r *Relay) loadMembers() {
	b, err := r.files.Read(membersName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var keys []identity.NodePublic
	if err == nil {
		err = json.Unmarshal(b, &keys)
	}
	if err != nil {
		r.log.Warn("the saved members are of no use; waiting for the control server", zap.Error(err))
		return
	}
	for _, k := range keys {
		r.members[k] = struct{}{}
	}
}

func machineKeyIn(files *identity.FileStore) (identity.MachinePrivate, error) {
	b, err := files.Read("machine.key")
	if errors.Is(err, fs.ErrNotExist) {
		k := identity.NewMachine()
		return k, files.Write("machine.key", []byte(k.Secret()))
	}
	if err != nil {
		return identity.MachinePrivate{}, err
	}
	return identity.ParseMachinePrivate(string(b))
}

// keysDir holds the small files of a server, in the data directory.
const keysDir = "keys"

// openFiles opens the small files of a server's data directory. They lie in a
// folder of their own, whose lock is not the database's.
func openFiles(dir string) (*identity.FileStore, error) {
	return identity.OpenFileStore(filepath.Join(dir, keysDir))
}
