package host

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"mesh/control/server"
)

// makeDataDir makes the data directory, or looks whether the one that is there
// is ours alone: who may write to it could put other keys in place.
func makeDataDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	// On Windows the mode bits say nothing about access.
	if perm := fi.Mode().Perm(); runtime.GOOS != "windows" && perm&0o022 != 0 {
		return fmt.Errorf("data directory %s: others may write to it (mode %04o): use one of your own, or chmod 700 it", dir, perm)
	}
	return nil
}

// maxSocketPath is what the shortest systems allow for a unix socket.
const maxSocketPath = 103

// socketPath returns where the data directory has a unix socket of that name.
func socketPath(dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("data directory %s: its path is too long for a unix socket in it", dir)
	}
	return path, nil
}

// serveAdmin opens the unix socket for administrators; its permissions are the
// authentication.
func (h *Host) serveAdmin() error {
	ln, err := listenPrivately(h.cfg.DataDir, h.socket)
	if err != nil {
		return fmt.Errorf("administrators' socket: %w", err)
	}
	h.onClose(func() { os.Remove(h.socket) })
	srv := server.HTTPServer(h.server.AdminHandler())
	srv.ErrorLog = log.New(debugWriter{h.log}, "", 0)
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return server.WithActor(ctx, userOf(c))
	}
	h.wg.Go(func() { h.fail("administrators' socket", srv.Serve(ln)) })
	h.onClose(func() { srv.Close() })
	return nil
}

// listenPrivately listens on a unix socket that at no moment anybody else may
// open: it is made in a directory of its own and moved to its place, over a
// leftover if there is one (nobody else serves this data directory).
func listenPrivately(dir, socket string) (net.Listener, error) {
	if runtime.GOOS == "windows" {
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		return net.Listen("unix", socket)
	}
	private := filepath.Join(dir, ".new")
	if err := os.RemoveAll(private); err != nil {
		return nil, err
	}
	if err := os.Mkdir(private, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(private, "s"), Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	err = os.Chmod(filepath.Join(private, "s"), 0o600)
	if err == nil {
		err = os.Rename(filepath.Join(private, "s"), socket)
	}
	if err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}
