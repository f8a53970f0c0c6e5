// Command relay compares this project's relay with the stock one of the same
// protocol: frames passed on per second of the relay's own CPU time. Each runs
// in a process of its own, with TLS or without, and this process loads both in turn, so
// that what else the machine does hits both alike. Every delivered frame is
// compared byte by byte, and the order of each flow is checked.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"

	"mesh/derp/relay"
	"mesh/identity"
)

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 3, "`TIMES` that each scenario is run with each relay")
	length := flag.Duration("for", 2*time.Second, "how `LONG` each run is measured")
	only := flag.String("only", "", "run only scenarios whose name contains `TEXT`")
	kinds := flag.String("kinds", "stock,ours", "`RELAYS` to compare; NAME=PROGRAM runs another build of ours")
	secure := flag.Bool("tls", false, "with TLS")
	profile := flag.String("profile", "", "write CPU profiles of the relays to `PREFIX`KIND.prof")
	flag.Parse()
	if flag.Arg(0) == "serve" {
		serve(flag.Arg(1), *profile, *secure)
		return
	}
	var procs []*process
	for _, k := range strings.Split(*kinds, ",") {
		procs = append(procs, start(k, *profile, *secure))
	}
	fmt.Printf("%-34s %-8s %12s %12s %9s %12s\n", "scenario", "relay", "frames/s", "frames/CPU-s", "ns/frame", "lost")
	for _, sc := range scenarios {
		if !strings.Contains(sc.name, *only) {
			continue
		}
		results := make([][]result, len(procs))
		for range *rounds {
			for i, p := range procs {
				results[i] = append(results[i], sc.run(p, *length))
			}
		}
		var first float64
		for i, p := range procs {
			slices.SortFunc(results[i], func(a, b result) int { return int(a.perCPU() - b.perCPU()) })
			r := results[i][len(results[i])/2]
			if i == 0 {
				first = r.perCPU()
			}
			fmt.Printf("%-34s %-8s %12.0f %12.0f %9.0f %11.1f%%  ×%.2f\n", sc.name, p.kind,
				float64(r.delivered)/r.took.Seconds(), r.perCPU(), 1e9/r.perCPU(),
				100*float64(r.lost)/float64(max(r.lost+r.delivered, 1)), r.perCPU()/first)
		}
	}
	for _, p := range procs {
		p.stop()
	}
}

// process is a relay that runs in a process of its own.
type process struct {
	kind, addr string
	secure     bool
	cmd        *exec.Cmd
	in         io.WriteCloser
	out        *bufio.Scanner
}

func start(kind, profile string, secure bool) *process {
	program, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	name, other, found := strings.Cut(kind, "=")
	kind = name
	if found {
		program, kind = other, "ours"
	}
	args := []string{"serve", kind}
	if profile != "" {
		args = append([]string{"-profile", profile + name + ".prof"}, args...)
	}
	if secure {
		args = append([]string{"-tls"}, args...)
	}
	p := &process{kind: name, secure: secure, cmd: exec.Command(program, args...)}
	p.cmd.Stderr = os.Stderr
	p.in, _ = p.cmd.StdinPipe()
	out, _ := p.cmd.StdoutPipe()
	p.out = bufio.NewScanner(out)
	if err := p.cmd.Start(); err != nil {
		log.Fatal(err)
	}
	p.addr = p.line()
	return p
}

func (p *process) line() string {
	if !p.out.Scan() {
		log.Fatalf("relay %s ended", p.kind)
	}
	return p.out.Text()
}

// cpu is what the process has used so far.
func (p *process) cpu() time.Duration {
	fmt.Fprintln(p.in, "cpu")
	n, err := strconv.ParseInt(p.line(), 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	return time.Duration(n)
}

func (p *process) stop() {
	p.in.Close()
	p.cmd.Wait()
}

// serve is the relay's side.
func serve(kind, profile string, secure bool) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(ln.Addr())
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			log.Fatal(err)
		}
		pprof.StartCPUProfile(f)
		defer f.Close()
		defer pprof.StopCPUProfile()
	}
	var cert tls.Certificate
	if secure {
		certPEM, keyPEM, _, err := relay.SelfSigned(nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
		if err != nil {
			log.Fatal(err)
		}
		if cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
			log.Fatal(err)
		}
	}
	switch kind {
	case "stock":
		if secure {
			ln = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}})
		}
		s := derpserver.New(key.NewNode(), func(string, ...any) {})
		go http.Serve(ln, derpserver.Handler(s))
	case "ours":
		s := relay.New(relay.Config{
			Key:   identity.NewNode(),
			Admit: func(context.Context, identity.NodePublic, netip.Addr) error { return nil },
		})
		var conf *tls.Config
		if secure {
			conf = relay.TLSConfig(cert, s)
		}
		go s.Serve(ln, conf)
	default:
		log.Fatalf("no relay %q", kind)
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var r syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
			log.Fatal(err)
		}
		fmt.Println(r.Utime.Nano() + r.Stime.Nano())
	}
}
