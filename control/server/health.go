package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
)

// Health is whether a server can do its work, and by what that shows.
type Health struct {
	Ready  bool              `json:"ready"`
	Checks map[string]string `json:"checks"` // "store", "policy", "server": "ok…" or why not
}

// healthFor is how long an answer to Health counts, so that who asks often does
// not make the database write.
const healthFor = time.Second

// readiness remembers the last answer.
type readiness struct {
	mu   sync.Mutex // guards the members below; held while the store is asked
	last Health
	at   time.Time
}

// Health looks whether the store takes writes, a policy is loaded and the server
// is not about to end. It asks the store once a second at most.
func (s *Server) Health(ctx context.Context) Health {
	r := &s.readiness
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.at) >= healthFor {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		r.last, r.at = s.checkHealth(ctx), time.Now()
	}
	h := Health{Ready: r.last.Ready, Checks: map[string]string{"server": "ok"}}
	for k, v := range r.last.Checks {
		h.Checks[k] = v
	}
	if s.ctx.Err() != nil || s.transport.isClosing() {
		h.Ready, h.Checks["server"] = false, "ends"
	}
	return h
}

func (s *Server) checkHealth(ctx context.Context) Health {
	h := Health{Ready: true, Checks: map[string]string{"store": "ok"}}
	if err := s.store.Writable(ctx); err != nil {
		s.log.Warn("the store does not take writes", zap.Error(err))
		h.Ready, h.Checks["store"] = false, storeTrouble(err)
	}
	p := s.PolicyState()
	h.Checks["policy"] = fmt.Sprintf("ok, version %d", p.Version)
	if p.DenyAll {
		// That is a state to be in: administrators and nodes can come.
		h.Checks["policy"] = "ok, there is none: nobody may reach anybody"
	}
	return h
}

// storeTrouble says what is wrong without paths and addresses.
func storeTrouble(err error) string {
	for _, known := range []error{store.ErrFull, store.ErrReadOnly, store.ErrCorrupt, store.ErrLocked, store.ErrUnavailable} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "does not answer"
	}
	return "failed"
}

// HealthHandler answers GET /healthz, which tells that the process lives, and
// GET /readyz, which tells in JSON whether the server can do its work: status
// 200 or 503.
func (s *Server) HealthHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		h := s.Health(r.Context())
		status := http.StatusOK
		if !h.Ready {
			status = http.StatusServiceUnavailable
		}
		writeJSON(w, status, h)
	})
	return mux
}
