// Package pgserver runs a PostgreSQL server of its own for a test or an example,
// on a unix socket only, from the programs that are on the machine.
package pgserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// User is the database's superuser, whom Start makes.
const User = "agent"

// Find returns the directory of initdb and postgres, or an error that says how to
// get them.
func Find() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			return filepath.Dir(path), nil
		}
	}
	var dirs []string
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql@*/bin"} {
		found, _ := filepath.Glob(pattern + "/initdb")
		dirs = append(dirs, found...)
	}
	if len(dirs) == 0 {
		return "", errors.New("no PostgreSQL server found: its programs initdb and postgres are neither on PATH nor in /usr/lib/postgresql/*/bin; on Debian: apt-get install postgresql")
	}
	// The newest version: numbers compare as numbers.
	number := func(path string) (n int) {
		digits := strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' })
		if len(digits) > 0 {
			n, _ = strconv.Atoi(digits[0])
		}
		return n
	}
	newest := slices.MaxFunc(dirs, func(a, b string) int { return number(a) - number(b) })
	return filepath.Dir(newest), nil
}

// Server is a running PostgreSQL server.
type Server struct {
	Version string // "PostgreSQL 17.5 …"
	Socket  string // path of its unix socket

	dir string
	bin string
	cmd *exec.Cmd
	// output is its log; closed at its end. gone is closed when all of that was
	// read.
	output chan string
	gone   chan struct{}
}

// Start makes a database server in dir, or goes on with the one that is there,
// and serves it on a unix socket. Whoever can open that may do everything. On
// Linux the server also ends when this process does, however that comes.
func Start(ctx context.Context, bin, dir string) (_ *Server, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	// PostgreSQL does not run as root, so root lends it another user.
	attr, err := unprivileged(dir)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"),
			"--pgdata="+data, "--username="+User, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
		initdb.Dir, initdb.SysProcAttr = dir, attr
		if out, err := initdb.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("initdb: %w: %s", err, strings.TrimSpace(string(out)))
		}
	}
	p := &Server{Socket: filepath.Join(dir, ".s.PGSQL.5432"), dir: dir, bin: bin, output: make(chan string, 64), gone: make(chan struct{})}
	version := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version")
	version.Dir, version.SysProcAttr = dir, attr
	out, err := version.Output()
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	p.Version = strings.TrimSpace(strings.Replace(string(out), "postgres (PostgreSQL)", "PostgreSQL", 1))
	p.cmd = exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-p", "5432",
		"-c", "listen_addresses=", // no TCP: the mesh is the only way in
		"-c", "unix_socket_directories="+dir,
		"-c", "unix_socket_permissions=0700",
		"-c", "fsync=off", "-c", "logging_collector=off", "-c", "log_destination=stderr", "-c", "lc_messages=C")
	p.cmd.Dir, p.cmd.SysProcAttr = dir, endWithParent(attr)
	log, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	started := make(chan error)
	go func() {
		// What counts as the parent's end is that of the thread which started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.read(log)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	var last string
	for {
		select {
		case line, ok := <-p.output:
			if !ok {
				return nil, fmt.Errorf("postgres did not start: %w; it said: %s", p.cmd.Wait(), last)
			}
			if last = line; strings.Contains(line, "ready to accept connections") {
				go func() { // nobody wants to know the rest
					defer close(p.gone)
					for range p.output {
					}
				}()
				return p, nil
			}
		case <-ctx.Done():
			p.cmd.Process.Kill()
			for range p.output {
			}
			p.cmd.Wait()
			return nil, fmt.Errorf("waiting for postgres: %w", ctx.Err())
		}
	}
}

func (p *Server) read(log io.Reader) {
	defer close(p.output)
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		p.output <- lines.Text()
	}
	io.Copy(io.Discard, log) // a line that is too long must not hold it up
}

// Stop ends the server and waits for it.
func (p *Server) Stop() {
	// SIGINT: do not wait for clients. Where there is no such signal, kill.
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		p.cmd.Process.Kill()
	}
	kill := time.AfterFunc(10*time.Second, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	<-p.gone
	p.cmd.Wait()
}

// URL names a database of the server, such as "postgres".
func (p *Server) URL(database string) string {
	return "postgres:///" + database + "?" + url.Values{"host": {p.dir}, "user": {User}, "sslmode": {"disable"}}.Encode()
}

// Create makes an empty database.
func (p *Server) Create(ctx context.Context, database string) error {
	createdb := exec.CommandContext(ctx, filepath.Join(p.bin, "createdb"), "--host="+p.dir, "--username="+User, database)
	if out, err := createdb.CombinedOutput(); err != nil {
		return fmt.Errorf("createdb: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Restart starts the server again, after Stop, with the data it had.
func (p *Server) Restart(ctx context.Context) error {
	q, err := Start(ctx, p.bin, p.dir)
	if err != nil {
		return err
	}
	*p = *q
	return nil
}
