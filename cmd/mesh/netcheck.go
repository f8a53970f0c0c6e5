package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netcheck"
	"mesh/internal/portmap"
)

const (
	// maxRelayMap bounds the file of --relay-map, in bytes.
	maxRelayMap = 1 << 20
	// leaveTimeout bounds the farewell of a node that only wanted the map.
	leaveTimeout = 2 * time.Second
)

var netcheckCommand = &command{
	name:  "netcheck",
	short: "report on this machine's network: UDP, NAT, port mapping, relays",
	long: `
It asks the relays of the mesh, and the gateway of the local network for port
mapping; nobody else. The relay map comes from the control server, as any node gets
it: with MESH_STATE_DIR it is asked as the node of that directory, which must not be
running, and the map saved there serves if the control server cannot be reached;
else as an ephemeral node that enrols with MESH_AUTHKEY, which uses up a key that is
good for one node. With --relay-map there is no need for a control server.

What is not known is absent from the JSON output. Latencies are in milliseconds.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		url := fs.String("control", "", "`URL` of the control server (default $MESH_CONTROL_URL)")
		file := fs.String("relay-map", "", "JSON `FILE` with the relay map, \"-\" for standard input")
		alone := fs.Bool("no-port-mapping", false, "do not ask the gateway for port mapping")
		return func(ctx context.Context, c *call) error {
			var relays *wire.DERPMap
			var err error
			switch {
			case *file != "" && *url != "":
				return usageError{"--relay-map and --control: give one of the two"}
			case *file != "":
				relays, err = readRelayMap(c, *file)
			default:
				relays, err = nodeRelayMap(ctx, *url)
			}
			if err != nil {
				return err
			}
			cfg := netcheck.Config{Relays: relays, Full: true, PortMapping: askGateway}
			if *alone {
				cfg.PortMapping = nil
			}
			r, err := netcheck.Run(ctx, cfg)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(r)
			}
			return writeReport(c.stdout, r)
		}
	},
}

// askGateway finds out what the gateway speaks.
func askGateway(ctx context.Context) netcheck.PortMapping {
	p := portmap.New(portmap.Config{})
	defer p.Close()
	r, err := p.Probe(ctx)
	m := netcheck.PortMapping{PCP: r.PCP, PMP: r.PMP, UPnP: r.UPnP, External: r.External}
	if err != nil {
		m.Error = err.Error()
	}
	return m
}

func readRelayMap(c *call, name string) (*wire.DERPMap, error) {
	b, err := readFile(c, name, maxRelayMap)
	if err != nil {
		return nil, err
	}
	m := new(wire.DERPMap)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%s is no relay map: %w", name, err)
	}
	return m, nil
}

// nodeRelayMap gets the relay map from the control server as a node gets it.
func nodeRelayMap(ctx context.Context, url string) (*wire.DERPMap, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	env := func(name string) string { return strings.TrimSpace(os.Getenv(name)) }
	if url == "" {
		url = env("MESH_CONTROL_URL")
	}
	dir, key := env("MESH_STATE_DIR"), env("MESH_AUTHKEY")
	switch {
	case url == "":
		return nil, errors.New("no relays to ask: give --relay-map, or --control or MESH_CONTROL_URL with the URL that `mesh serve` prints")
	case dir == "" && key == "":
		return nil, errors.New("to get the relays as a node, set MESH_AUTHKEY to an enrolment key, or MESH_STATE_DIR to the state of a node that is not running")
	}
	var store identity.Store = new(identity.MemoryStore)
	if dir != "" {
		f, err := identity.OpenFileStore(dir)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		store, key = f, ""
	}
	state, err := identity.LoadState(store)
	if err != nil {
		return nil, err
	}
	if dir != "" && !state.Enrolled {
		return nil, fmt.Errorf("%s holds no node that is enrolled", dir)
	}
	cfg := control.Config{URL: url, Machine: state.Machine}
	if pin := env("MESH_CONTROL_KEY"); pin != "" {
		if cfg.ServerKey, err = identity.ParseMachinePublic(pin); err != nil {
			return nil, fmt.Errorf("MESH_CONTROL_KEY: %w", err)
		}
	}
	client, err := control.New(cfg)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if err := client.Proven(); err != nil {
		return nil, fmt.Errorf("%w with MESH_CONTROL_KEY", err)
	}
	relays, err := fetchRelayMap(ctx, client, state.Node.Public(), key)
	var unreachable *control.UnreachableError
	if errors.As(err, &unreachable) && dir != "" {
		if m, _, e := client.SavedMap(store, state.Node.Public()); e == nil && m.DERPMap() != nil {
			return m.DERPMap(), nil
		}
	}
	return relays, err
}

// fetchRelayMap registers a node and follows its map stream until that tells
// the relays. A node that enrols with a key is ephemeral and leaves again.
func fetchRelayMap(ctx context.Context, client *control.Client, node identity.NodePublic, key string) (*wire.DERPMap, error) {
	info := &wire.Hostinfo{Hostname: "mesh-netcheck", OS: runtime.GOOS, GoArch: runtime.GOARCH, Package: "mesh"}
	if name, err := os.Hostname(); key == "" && err == nil {
		info.Hostname = name
	}
	req := wire.RegisterRequest{NodeKey: node, Hostinfo: info}
	if key != "" {
		req.Auth, req.Ephemeral = &wire.RegisterAuth{AuthKey: key}, true
	}
	if _, err := client.Register(ctx, req); err != nil {
		return nil, err
	}
	if key != "" {
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
			defer cancel()
			client.Logout(ctx, node) // it is forgotten anyway when it stays away
		}()
	}
	var relays *wire.DERPMap
	done := errors.New("enough")
	disco := identity.NewDisco().Public()
	err := client.Stream(ctx, func() wire.MapRequest {
		return wire.MapRequest{NodeKey: node, DiscoKey: disco, Hostinfo: info, ReadOnly: true}
	}, func(m *wire.MapResponse) error {
		if m.DERPMap == nil || m.DERPMap.Regions == nil {
			return nil
		}
		relays = m.DERPMap
		return done
	})
	if relays == nil {
		return nil, fmt.Errorf("get the relays: %w", err)
	}
	return relays, nil
}
