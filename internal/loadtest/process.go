package loadtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/host"
	"mesh/identity"
)

// Usage is what a server has used.
type Usage struct {
	CPU       time.Duration // since it began
	RSS, Peak int64         // bytes: now, and the most so far
}

// Serve is the server's process: it serves from an empty directory until in ends,
// says where it is, and answers commands, one a line: "heap", which may name a file
// for a profile of it, "profile FILE", "profile". database is the URL of one that it
// shares, "" = a file.
func Serve(dir, database string, in io.Reader, out io.Writer) error {
	h, err := host.Start(host.Config{DataDir: dir, Database: database, Listen: "127.0.0.1:0", STUN: "off", EphemeralTimeout: 20 * time.Second})
	if err != nil {
		return err
	}
	defer h.Close()
	fmt.Fprintln(out, h.URL(), h.Key(), h.Socket())
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		if err := command(lines.Text(), out); err != nil {
			return err
		}
	}
	return lines.Err()
}

func command(line string, out io.Writer) error {
	name, arg, _ := strings.Cut(line, " ")
	switch {
	case name == "heap":
		var s runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&s)
		if arg != "" {
			if err := heapProfile(arg); err != nil {
				return err
			}
		}
		fmt.Fprintln(out, s.HeapAlloc, runtime.NumGoroutine())
		return nil
	case name == "profile" && arg == "":
		pprof.StopCPUProfile()
	case name == "profile":
		f, err := os.Create(arg)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "ok")
	return nil
}

func heapProfile(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("heap").WriteTo(f, 0), f.Close())
}

// Process is a server in a process of its own.
type Process struct {
	URL   string
	Key   identity.MachinePublic
	Admin *admin.Client

	dir    string
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	killed bool
}

// serveWord and two more arguments, the directory and the database, tell this
// program to run Serve.
const serveWord = "serve"

// Served runs Serve if this process is to do that, and reports whether it was.
// Programs that call Start begin with it.
func Served() bool {
	if len(os.Args) != 4 || os.Args[1] != serveWord {
		return false
	}
	if err := Serve(os.Args[2], os.Args[3], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "serve:", err)
		os.Exit(1)
	}
	return true
}

// Start runs Serve in a process of its own. The program has to begin with
// Served.
func Start(database string) (_ *Process, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := new(Process)
	if p.dir, err = os.MkdirTemp("", "load"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(p.dir)
		}
	}()
	p.cmd = exec.Command(self, serveWord, p.dir, database)
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	var key, socket string
	if _, err := fmt.Fscanln(p.out, &p.URL, &key, &socket); err != nil {
		return nil, errors.Join(fmt.Errorf("start the server: %w", err), p.Close())
	}
	if err := p.Key.UnmarshalText([]byte(key)); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	p.Admin = admin.NewClient(socket)
	return p, nil
}

// Close ends the server and waits for it.
func (p *Process) Close() error {
	if p.killed {
		return nil
	}
	p.in.Close()
	return errors.Join(p.cmd.Wait(), os.RemoveAll(p.dir))
}

// Kill ends the server without a word to it.
func (p *Process) Kill() error {
	err := p.cmd.Process.Kill()
	p.cmd.Wait() // which says that it was killed
	p.killed = true
	return errors.Join(err, os.RemoveAll(p.dir))
}

func (p *Process) ask(line string) (string, error) {
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		return "", err
	}
	return p.out.ReadString('\n')
}

// Profile writes a CPU profile of the server to a file until it is called with
// "".
func (p *Process) Profile(file string) error {
	_, err := p.askFile("profile", file)
	return err
}

// Usage measures the server. CPU and RSS are known on Linux only.
func (p *Process) Usage() (u Usage, err error) {
	u.CPU, u.RSS, u.Peak = processUsage(p.cmd.Process.Pid)
	return u, nil
}

// askFile asks with the name of a file, if there is one.
func (p *Process) askFile(line, file string) (string, error) {
	if file != "" {
		abs, err := filepath.Abs(file)
		if err != nil {
			return "", err
		}
		line += " " + abs
	}
	return p.ask(line)
}

// Heap has the server collect its garbage and returns what is left, in bytes,
// and how many goroutines it has. A profile of what is left goes to file, unless
// that is "".
func (p *Process) Heap(file string) (bytes int64, goroutines int, err error) {
	answer, err := p.askFile("heap", file)
	if err == nil {
		_, err = fmt.Sscan(answer, &bytes, &goroutines)
	}
	return bytes, goroutines, err
}

// processUsage reads what the kernel says of a process; zero where it says
// nothing.
func processUsage(pid int) (cpu time.Duration, rss, peak int64) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, 0, 0
	}
	// The name of the program, in parentheses, may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) > 12 {
		for _, f := range fields[11:13] { // utime and stime, in ticks
			n, _ := strconv.ParseInt(f, 10, 64)
			cpu += time.Duration(n) * (time.Second / 100)
		}
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return cpu, 0, 0
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			rss = n << 10
		case "VmHWM:":
			peak = n << 10
		}
	}
	return cpu, rss, peak
}

// waitFor calls f every so often until it reports that something is so.
func waitFor(ctx context.Context, every time.Duration, f func() (bool, error)) error {
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		if err := wait(ctx, every); err != nil {
			return err
		}
	}
}
