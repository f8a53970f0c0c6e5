package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"mesh/control/host"
)

var serveCommand = &command{
	name:  "serve",
	short: "run the control plane, a relay and STUN in this process",
	long: `
It prints its URL and key when it is ready, and runs until it gets SIGINT or
SIGTERM. Agents need the URL (MESH_CONTROL_URL) and an enrolment key (mesh key
create); they may pin the server's key (MESH_CONTROL_KEY), and should unless the URL
is https or on this machine. Who has no key is sent to a page of this server that
shows who asks; mesh node approve lets it in. All state is in the data directory,
which one server at a time may use; a server that was killed at any moment starts
again with all of it.

With --database the data is in a PostgreSQL database instead, and only the keys of the
relay and the administrators' socket in the data directory. Several servers with data
directories of their own may use one database: nodes may go to any of them, and are
given all their URLs, with commas. One whose data directory is a copy of another's in use
takes a name of its own. The URL is better given
in MESH_DATABASE, which other users of the machine cannot see, or without a password,
which then comes from PostgreSQL's password file.

Without a policy (--policy, or mesh policy set) nobody may reach anybody.

One TCP port serves control and relay: control as plain HTTP, in which the protocol
is encrypted, and the relay as TLS with a certificate of its own. With --tls-cert and
--tls-key everything is TLS; the files are read again when they change. --acme gets
and renews the certificate from an authority: port 443 of DOMAIN must lead to --listen;
key and certificate stay in the data directory. STUN has a UDP port.

/healthz (the process lives) and /readyz (the database takes writes) are answered on
the port for nodes. --metrics opens another for these and for /metrics, in the text
form of Prometheus, to whoever reaches it: choose an address of this host or of a
network of yours. They hold no names, keys or addresses.
--pprof opens a socket for profiles, to the user that runs the server and nobody else:
  curl --unix-socket DIR/pprof.sock http://pprof/debug/pprof/heap > heap.pb.gz`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var cfg host.Config
		data := dataFlag(fs)
		fs.StringVar(&cfg.Listen, "listen", host.DefaultListen, "TCP `ADDR` for nodes (default "+host.DefaultListen+")")
		fs.StringVar(&cfg.URL, "url", "", "`URL` at which nodes reach --listen (default from --listen)")
		fs.StringVar(&cfg.STUN, "stun", "", fmt.Sprintf("UDP `ADDR` for STUN, or \"off\" (default port %d, host of --listen)", host.DefaultSTUNPort))
		fs.StringVar(&cfg.Domain, "domain", "", "`SUFFIX` of all names (default mesh.internal)")
		fs.StringVar(&cfg.PolicyFile, "policy", "", "policy `FILE` to put in force (default the last one)")
		fs.BoolVar(&cfg.NoRelay, "no-relay", false, "no relay and no STUN here: see mesh help relay")
		fs.IntVar(&cfg.RelayRate, "relay-rate", 0, "most `BYTES` a second that a node may relay (default no limit)")
		fs.StringVar(&cfg.TLSCert, "tls-cert", "", "PEM `FILE` of the certificate")
		fs.StringVar(&cfg.TLSKey, "tls-key", "", "PEM `FILE` of the certificate's key")
		fs.Func("acme", "`DOMAIN` to get a certificate for; may be repeated", func(s string) error {
			cfg.ACME.Domains = append(cfg.ACME.Domains, s)
			return nil
		})
		fs.StringVar(&cfg.ACME.Directory, "acme-directory", "", "`URL` of the ACME directory of an authority of your choice")
		fs.StringVar(&cfg.ACME.Email, "acme-email", "", "`ADDRESS` that the authority may write to (default none)")
		fs.StringVar(&cfg.ACME.CA, "acme-ca", "", "PEM `FILE` to trust the directory by (default the system's)")
		nodeExpiryFlag(fs, &cfg.NodeExpiry, "how `LONG` keys of users' nodes live: \"30d\" or \"never\" (default 90d)")
		fs.StringVar(&cfg.Database, "database", "", "PostgreSQL `URL` (default a file in --data; $MESH_DATABASE)")
		fs.StringVar(&cfg.Metrics, "metrics", "", "TCP `ADDR` for /metrics, /healthz and /readyz (default none)")
		fs.BoolVar(&cfg.Pprof, "pprof", false, "profiles at "+host.PprofName+", a socket in the data directory")
		verbose := fs.Bool("v", false, "log what happens, on stderr")
		return func(ctx context.Context, c *call) (err error) {
			switch {
			case (cfg.TLSCert == "") != (cfg.TLSKey == ""):
				return usageError{"--tls-cert and --tls-key need each other"}
			case len(cfg.ACME.Domains) > 0 && (cfg.TLSCert != "" || cfg.ACME.Directory == ""):
				return usageError{"--acme needs --acme-directory, and goes without --tls-cert"}
			case len(cfg.ACME.Domains) == 0 && cfg.ACME.Directory+cfg.ACME.Email+cfg.ACME.CA != "":
				return usageError{"--acme-directory, --acme-email and --acme-ca are for --acme"}
			}
			if cfg.Database == "" {
				cfg.Database = os.Getenv("MESH_DATABASE")
			}
			if cfg.Database != "" && !isPostgres(cfg.Database) {
				return usageError{"--database: want postgres://USER@HOST/NAME"}
			}
			if cfg.DataDir, err = dataDir(*data); err != nil {
				return err
			}
			cfg.Logger = newLogger(c.stderr, *verbose)
			cfg.Drain = drainFor
			return serve(ctx, c, cfg)
		}
	},
}

func isPostgres(url string) bool {
	return strings.HasPrefix(url, "postgres://") || strings.HasPrefix(url, "postgresql://")
}

func serve(ctx context.Context, c *call, cfg host.Config) error {
	h, err := host.Start(cfg)
	if err != nil {
		return startComplaint(cfg.PolicyFile, err)
	}
	defer h.Close()
	c.printf("%s", ready(h, cfg))
	select {
	case <-ctx.Done():
		return nil
	case err := <-h.Failed():
		return err
	}
}

// ready tells where the server is and how to go on.
func ready(h *host.Host, cfg host.Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, "url     %s\nkey     %s\n", h.URL(), h.Key())
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		dir = cfg.DataDir
	}
	fmt.Fprintf(&b, "data    %s\n", dir)
	switch stun := h.STUNAddr(); {
	case cfg.NoRelay:
		fmt.Fprintf(&b, "relay   none here\n")
	case stun == "":
		fmt.Fprintf(&b, "relay   built in, without STUN\n")
	default:
		fmt.Fprintf(&b, "relay   built in, STUN at %s\n", stun)
	}
	if addr := h.MetricsAddr(); addr != "" {
		fmt.Fprintf(&b, "metrics http://%s/metrics\n", addr)
	}
	p := h.Server().PolicyState()
	if p.DenyAll {
		fmt.Fprintf(&b, "policy  none: nobody may reach anybody\n")
	} else {
		fmt.Fprintf(&b, "policy  version %d\n", p.Version)
	}
	flag := ""
	if def, err := dataDir(""); err != nil || def != cfg.DataDir {
		flag = " --data " + shellQuote(dir)
	}
	pin := ""
	if !trusted(h.URL()) {
		pin = " MESH_CONTROL_KEY=" + h.Key().String()
	}
	fmt.Fprintf(&b, "\nready; go on in another terminal:\n")
	if p.DenyAll {
		fmt.Fprintf(&b, "  mesh policy set FILE%s\n", flag)
	}
	fmt.Fprintf(&b, "  mesh key create --tag tag:NAME%s\n", flag)
	fmt.Fprintf(&b, "  MESH_CONTROL_URL=%s%s MESH_AUTHKEY=KEY your-agent\n", h.URL(), pin)
	return b.String()
}

// trusted reports whether a URL by itself says who answers there: by a
// certificate, or because it does not leave this machine.
func trusted(u string) bool {
	p, err := url.Parse(u)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(p.Hostname())
	return p.Scheme == "https" || p.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// shellQuote makes a path fit to be pasted.
func shellQuote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// newLogger writes what an operator should know to w, or all that happens.
func newLogger(w io.Writer, verbose bool) *zap.Logger {
	level := zapcore.WarnLevel
	if verbose {
		level = zapcore.DebugLevel
	}
	conf := zap.NewDevelopmentEncoderConfig()
	conf.EncodeTime = zapcore.ISO8601TimeEncoder
	conf.EncodeLevel = zapcore.LowercaseLevelEncoder
	conf.ConsoleSeparator = "  "
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(conf), zapcore.Lock(zapcore.AddSync(w)), level))
}
