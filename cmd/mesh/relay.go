package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/host"
	"mesh/identity"
)

var relayCommand = &command{
	name:  "relay",
	short: "run a relay in a process of its own",
	long: `
The relay passes on ciphertext between members of the mesh, whom the control server
names; nobody else is admitted. It remembers them and goes on with those it knows
while the control server is away, also after a restart.

The relay key, which mesh key create --relay prints, comes from $MESH_RELAY_KEY or
from --key-file; there is no flag for it, since everybody on a machine may read the
arguments of its processes.

It prints where it listens, and "announced" when the control server has accepted it.
Told to end, it sends nodes to other relays and goes when they have moved, or after
--drain; a second signal ends it at once.
Relays with the same --region and relay key serve as one: they pass packets on to
each other, and nodes move among them.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var cfg host.RelayConfig
		fs.StringVar(&cfg.DataDir, "data", "", "`DIR` of keys and members (default USER-CONFIG-DIR/mesh-relay)")
		fs.StringVar(&cfg.Listen, "listen", "127.0.0.1:8443", "TCP `ADDR` for nodes (default 127.0.0.1:8443)")
		fs.StringVar(&cfg.STUN, "stun", "", fmt.Sprintf("UDP `ADDR` for STUN, or \"off\" (default port %d, host of --listen)", host.DefaultSTUNPort))
		fs.StringVar(&cfg.Host, "host", "", "`NAME` or address at which nodes reach --listen")
		fs.StringVar(&cfg.ControlURL, "control", "", "`URL` of the control server (default $MESH_CONTROL_URL)")
		pin := fs.String("control-key", "", "pinned `KEY` of the control server (default $MESH_CONTROL_KEY)")
		keyFile := fs.String("key-file", "", "`FILE` with the relay key (default $MESH_RELAY_KEY itself)")
		fs.IntVar(&cfg.Region, "region", 901, "region `NUMBER`, 1 to 65535 (default 901)")
		fs.StringVar(&cfg.RegionName, "name", "", "`NAME` of the region for people (default \"relay NUMBER\")")
		fs.StringVar(&cfg.TLSCert, "tls-cert", "", "PEM `FILE` of the certificate (default one that nodes pin)")
		fs.StringVar(&cfg.TLSKey, "tls-key", "", "PEM `FILE` of the certificate's key")
		fs.IntVar(&cfg.Rate, "rate", 0, "most `BYTES` a second from one node (default no limit)")
		fs.DurationVar(&cfg.Drain, "drain", drainFor, "how `LONG` to wait at the end for nodes to move (default 5s)")
		fs.StringVar(&cfg.Metrics, "metrics", "", "TCP `ADDR` for /metrics, /healthz and /readyz (default none)")
		verbose := fs.Bool("v", false, "log what happens, on stderr")
		return func(ctx context.Context, c *call) (err error) {
			if cfg.ControlURL == "" {
				cfg.ControlURL = os.Getenv("MESH_CONTROL_URL")
			}
			if *pin == "" {
				*pin = os.Getenv("MESH_CONTROL_KEY")
			}
			switch {
			case (cfg.TLSCert == "") != (cfg.TLSKey == ""):
				return usageError{"--tls-cert and --tls-key need each other"}
			case cfg.Region < 1 || cfg.Region > 65535:
				return usageError{"--region: want a number between 1 and 65535"}
			case cfg.ControlURL == "":
				return errors.New("no control server: give --control or set MESH_CONTROL_URL to the URL that `mesh serve` prints")
			}
			if *pin != "" {
				if cfg.ControlKey, err = identity.ParseMachinePublic(*pin); err != nil {
					return fmt.Errorf("--control-key: %w", err)
				}
			}
			if cfg.RelayKey, err = secretFrom("MESH_RELAY_KEY", *keyFile); err != nil {
				return fmt.Errorf("relay key: %w", err)
			}
			if cfg.RelayKey == "" {
				return errors.New("no relay key: set MESH_RELAY_KEY or give --key-file; `mesh key create --relay` makes one")
			}
			if cfg.DataDir == "" {
				if cfg.DataDir, err = configDir("mesh-relay"); err != nil {
					return err
				}
			}
			cfg.Logger = newLogger(c.stderr, *verbose)
			return serveRelay(ctx, c, cfg)
		}
	},
}

// drainFor is how long a relay waits for nodes to move elsewhere.
const drainFor = 5 * time.Second

func serveRelay(ctx context.Context, c *call, cfg host.RelayConfig) error {
	states := make(chan error)
	done := make(chan struct{})
	cfg.OnState = func(err error) {
		select {
		case states <- err:
		case <-done:
		}
	}
	r, err := host.StartRelay(cfg)
	if err != nil {
		return err
	}
	defer func() {
		close(done) // OnState holds nobody up any more
		r.Close()
	}()
	c.printf("relay   %s, region %d\n", r.Addr(), r.Region())
	if stun := r.STUNAddr(); stun != "" {
		c.printf("stun    %s\n", stun)
	}
	if addr := r.MetricsAddr(); addr != "" {
		c.printf("metrics http://%s/metrics\n", addr)
	}
	c.printf("members %d known\n", r.Members())
	connected, told := false, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-r.Failed():
			return err
		case err := <-states:
			switch {
			case err == nil && !connected:
				c.printf("announced to %s; members: %d\n", cfg.ControlURL, r.Members())
				connected, told = true, false
			case err != nil && !told:
				select {
				case err := <-r.Failed(): // no mere absence
					return err
				default:
				}
				fmt.Fprintf(c.stderr, "mesh relay: going on with %d known members: %s\n", r.Members(), oneLine(err.Error()))
				connected, told = false, true
			}
		}
	}
}

// writeRelays prints the relay map.
func writeRelays(c *call, relays []admin.Relay) {
	now := time.Now()
	t := newTable(c.stdout, "REGION", "NAME", "HOST", "KIND", "CONTROL", "CREATED")
	for _, r := range relays {
		kind, state, created := "process", "away", ago(r.Created, now)
		switch {
		case r.Draining:
			state = "drains"
		case r.Connected:
			state = "connected"
		case r.Hidden:
			state = "gone"
		}
		if r.BuiltIn {
			kind, state, created = "built in", "", ""
		}
		t.row(strconv.Itoa(r.Region), r.Name, r.Host, kind, state, created)
	}
	t.flush()
}

var relayList = &command{
	name: "relay list", short: "list the relays that nodes are told of",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			relays, err := s.Relays(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(relays)
			}
			writeRelays(c, relays)
			return nil
		})
	},
}

var relayRemove = &command{
	name: "relay remove", args: "NAME|REGION", min: 1, max: 1,
	short: "take relays out of the map; their key stays (mesh key revoke)",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if err := s.RemoveRelay(ctx, c.args[0]); err != nil {
				return err
			}
			c.printf("relay %s removed\n", c.args[0])
			return nil
		})
	},
}

// secretFrom reads a secret from the environment or a file. It is no argument
// of the command: other users of the machine may see those.
func secretFrom(env, file string) (string, error) {
	if file == "" {
		return strings.TrimSpace(os.Getenv(env)), nil
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", file, err)
	}
	return strings.TrimSpace(string(b)), nil
}
