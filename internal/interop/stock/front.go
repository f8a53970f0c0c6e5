package stock

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"unsafe"

	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/util/zstdframe"
)

// front stands between the encrypted connections and the stock control server.
// It counts requests, answers some with failures, and adds to map streams what
// the stock server would never send: the server itself has no place for that.
type front struct {
	next http.Handler

	mu      sync.Mutex
	seen    map[string]int // guarded by mu; requests so far, by "METHOD path"
	faults  []*fault       // guarded by mu
	junk    bool           // guarded by mu; add unknown members to map messages
	streams map[string]*mapStream
}

// fault is how requests fail.
type fault struct {
	Path       string // of the request, "/machine/register"
	Stream     bool   // only map polls
	Status     int
	RetryAfter string
	Body       string
	Times      int
}

func newFront(next http.Handler) *front {
	return &front{next: next, seen: make(map[string]int), streams: make(map[string]*mapStream)}
}

// putBefore makes a stock control server ask f first, for all that comes over
// its encrypted connections. They are served by a field that is not exported.
func putBefore(s *testcontrol.Server) *front {
	s.ServeHTTP(discard{}, must(http.NewRequest("GET", "/key?v=1", nil))) // makes the field, and its key
	field := reflect.ValueOf(s).Elem().FieldByName("mux")
	mux := (**http.ServeMux)(unsafe.Pointer(field.UnsafeAddr()))
	f := newFront(*mux)
	all := http.NewServeMux()
	all.Handle("/", f)
	*mux = all
	return f
}

func must[T any](v T, err error) T {
	if err != nil {
		fatal("%v", err)
	}
	return v
}

type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) WriteHeader(int)             {}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var req struct {
		NodeKey  string
		Stream   bool
		Compress string
	}
	if r.Method == http.MethodPost {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		json.Unmarshal(body, &req)
	}
	what := r.Method + " " + r.URL.Path
	if req.Stream {
		what = "POLL " + r.URL.Path
	}
	f.mu.Lock()
	f.seen[what]++
	var now *fault
	for i, x := range f.faults {
		if x.Path == r.URL.Path && x.Stream == req.Stream {
			now = x
			if x.Times--; x.Times <= 0 {
				f.faults = append(f.faults[:i:i], f.faults[i+1:]...)
			}
			break
		}
	}
	f.mu.Unlock()
	switch {
	case now != nil:
		if now.RetryAfter != "" {
			w.Header().Set("Retry-After", now.RetryAfter)
		}
		http.Error(w, now.Body, now.Status)
	case strings.HasPrefix(r.URL.Path, "/ping/"):
		w.WriteHeader(http.StatusOK)
	case req.Stream:
		s := &mapStream{ResponseWriter: w, front: f, zstd: req.Compress == "zstd"}
		f.mu.Lock()
		f.streams[req.NodeKey] = s
		f.mu.Unlock()
		f.next.ServeHTTP(s, r)
		f.mu.Lock()
		if f.streams[req.NodeKey] == s {
			delete(f.streams, req.NodeKey)
		}
		f.mu.Unlock()
		s.end()
	default:
		f.next.ServeHTTP(w, r)
	}
}

// mapStream is the answer to a map poll. The server writes a message in two
// pieces and flushes; whole messages leave.
type mapStream struct {
	http.ResponseWriter
	front *front
	zstd  bool

	mu      sync.Mutex
	pending []byte // guarded by mu
	sent    int    // guarded by mu; messages
	ended   bool   // guarded by mu
}

func (s *mapStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = append(s.pending, p...)
	return len(p), nil
}

func (s *mapStream) Flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	msg := s.pending
	s.pending = nil
	s.front.mu.Lock()
	junk := s.front.junk
	s.front.mu.Unlock()
	if junk && len(msg) > 4 {
		if text, err := s.decode(msg[4:]); err == nil {
			msg = s.frame(addJunk(text))
		}
	}
	s.ResponseWriter.Write(msg)
	s.ResponseWriter.(http.Flusher).Flush()
	s.sent++
}

func (s *mapStream) end() {
	s.mu.Lock()
	s.ResponseWriter.Write(s.pending) // the text of a refusal
	s.ended = true
	s.mu.Unlock()
}

func (s *mapStream) decode(b []byte) ([]byte, error) {
	if !s.zstd {
		return b, nil
	}
	return zstdframe.AppendDecode(nil, b)
}

func (s *mapStream) frame(text []byte) []byte {
	if s.zstd {
		text = zstdframe.AppendEncode(nil, text, zstdframe.FastestCompression)
	}
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(text))), text...)
}

// raw sends a message of the test's own making, of which the server knows
// nothing.
func (s *mapStream) raw(text []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return fmt.Errorf("the map stream has ended")
	}
	s.ResponseWriter.Write(s.frame(text))
	s.ResponseWriter.(http.Flusher).Flush()
	s.sent++
	return nil
}

// stream returns the map stream of a node.
func (f *front) stream(nodeKey string) (*mapStream, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.streams[nodeKey]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("node %s does not poll", nodeKey)
}

// addJunk puts members that nobody knows into each object of a message that has
// a shape of its own.
func addJunk(text []byte) []byte {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var m map[string]any
	if d.Decode(&m) != nil {
		return text
	}
	unknown := map[string]any{"a": []any{1, "x", nil, map[string]any{"deep": true}}}
	mark := func(v any) {
		if o, ok := v.(map[string]any); ok {
			o["XFutureMember"], o["xFuture2"] = unknown, 1e30
		}
	}
	mark(m)
	mark(m["Node"])
	mark(m["DERPMap"])
	mark(m["DNSConfig"])
	m["DisplayMessages"] = map[string]any{"future": map[string]any{"Title": "T", "Text": "x", "Severity": "low"}, "*": nil}
	m["TKAInfo"], m["ControlDialPlan"] = nil, map[string]any{"Candidates": []any{map[string]any{"IP": "192.0.2.250", "Priority": 1}}}
	m["Health"], m["DeprecatedDefaultAutoUpdate"] = []string{"something is odd"}, true
	m["ClientVersion"] = map[string]any{"LatestVersion": "99.0", "Notify": true}
	for _, list := range []string{"Peers", "PeersChanged", "PeersChangedPatch", "UserProfiles", "PacketFilter"} {
		if l, ok := m[list].([]any); ok {
			for _, v := range l {
				mark(v)
			}
		}
	}
	out, err := json.Marshal(m)
	if err != nil {
		return text
	}
	return out
}
