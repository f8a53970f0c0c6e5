package host

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"runtime/pprof"
	"runtime/trace"
	"strconv"
	"sync"
	"time"

	"mesh/control/server"
)

// PprofName is the unix socket of Config.Pprof, in the data directory.
const PprofName = "pprof.sock"

// maxProfile bounds how long a profile may be taken.
const maxProfile = 5 * time.Minute

// servePprof opens the unix socket for profiles, if Config.Pprof is set. The
// standard handlers are not used: to import them puts them on the default mux
// of every program that links this package.
func (h *Host) servePprof() error {
	if !h.cfg.Pprof {
		return nil
	}
	path, err := socketPath(h.cfg.DataDir, PprofName)
	if err != nil {
		return err
	}
	ln, err := listenPrivately(h.cfg.DataDir, path)
	if err != nil {
		return fmt.Errorf("socket for profiles: %w", err)
	}
	h.onClose(func() { os.Remove(path) })
	p := profiler{end: h.closing}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/profile", p.sampled(func(w http.ResponseWriter) error { return pprof.StartCPUProfile(w) }, pprof.StopCPUProfile))
	mux.HandleFunc("GET /debug/pprof/trace", p.sampled(func(w http.ResponseWriter) error { return trace.Start(w) }, trace.Stop))
	mux.HandleFunc("GET /debug/pprof/{name}", p.snapshot)
	srv := server.HTTPServer(mux)
	srv.WriteTimeout = maxProfile + time.Minute
	srv.ErrorLog = log.New(debugWriter{h.log}, "", 0)
	h.wg.Go(func() { h.fail("socket for profiles", srv.Serve(ln)) })
	h.onClose(func() {
		srv.Close()
		p.running.Wait()
	})
	return nil
}

// profiler takes profiles of this process.
type profiler struct {
	end     <-chan struct{} // ends what is being sampled
	running sync.WaitGroup
}

// snapshot answers with a profile of the runtime: heap, goroutine, mutex, …
func (p *profiler) snapshot(w http.ResponseWriter, r *http.Request) {
	prof := pprof.Lookup(r.PathValue("name"))
	if prof == nil {
		http.Error(w, "no such profile", http.StatusNotFound)
		return
	}
	debug, _ := strconv.Atoi(r.URL.Query().Get("debug"))
	w.Header().Set("Content-Type", "application/octet-stream")
	prof.WriteTo(w, debug)
}

// sampled answers with what is recorded between start and stop, for as many
// seconds as the caller says, 30 if it does not.
func (p *profiler) sampled(start func(http.ResponseWriter) error, stop func()) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p.running.Add(1)
		defer p.running.Done()
		seconds, err := strconv.ParseFloat(r.URL.Query().Get("seconds"), 64)
		if err != nil || seconds <= 0 {
			seconds = 30
		}
		ctx, cancel := context.WithTimeout(r.Context(), min(time.Duration(seconds*float64(time.Second)), maxProfile))
		defer cancel()
		w.Header().Set("Content-Type", "application/octet-stream")
		if err := start(w); err != nil {
			http.Error(w, "another one is being taken", http.StatusConflict)
			return
		}
		defer stop()
		select {
		case <-ctx.Done():
		case <-p.end:
		}
	}
}
