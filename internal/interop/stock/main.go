package stock

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync"
)

// Main runs the program. The first argument says what to be.
func Main() {
	if len(os.Args) < 2 {
		fatal("usage: stock node|servers FLAG…")
	}
	// The stock client would try to send its logs to its vendor.
	os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	var handlers map[string]handler
	var closeAll func()
	switch os.Args[1] {
	case "node":
		handlers, closeAll = newNode(os.Args[2:])
	case "servers":
		handlers, closeAll = newServers(os.Args[2:])
	default:
		fatal("unknown role %q", os.Args[1])
	}
	serve(handlers)
	closeAll()
}

func fatal(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(2)
}

// handler answers one request; args is its JSON.
type handler func(ctx context.Context, args json.RawMessage) (any, error)

type request struct {
	ID   int64
	Op   string
	Args json.RawMessage
}

type response struct {
	ID     int64  `json:",omitempty"`
	Error  string `json:",omitempty"`
	Result any    `json:",omitempty"`
	// Event is set, and ID is not, on what nobody asked for.
	Event string `json:",omitempty"`
}

var outMu sync.Mutex // one line at a time on standard output

func send(r response) {
	line, err := json.Marshal(r)
	if err != nil {
		line, _ = json.Marshal(response{ID: r.ID, Error: err.Error()})
	}
	outMu.Lock()
	defer outMu.Unlock()
	os.Stdout.Write(append(line, '\n'))
}

// event tells the test something unasked.
func event(name string, what any) { send(response{Event: name, Result: what}) }

// serve answers requests, each in its goroutine, until standard input ends.
func serve(handlers map[string]handler) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<24)
	for in.Scan() {
		var r request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			fatal("bad request: %v", err)
		}
		wg.Go(func() {
			h := handlers[r.Op]
			if h == nil {
				send(response{ID: r.ID, Error: "unknown operation " + r.Op})
				return
			}
			result, err := h(ctx, r.Args)
			if err != nil {
				send(response{ID: r.ID, Error: err.Error()})
				return
			}
			send(response{ID: r.ID, Result: result})
		})
	}
	cancel()
	wg.Wait()
}

// typed makes a handler of a function with arguments of type A.
func typed[A any](f func(ctx context.Context, a A) (any, error)) handler {
	return func(ctx context.Context, raw json.RawMessage) (any, error) {
		var a A
		if len(raw) > 0 {
			if err := json.Unmarshal(raw, &a); err != nil {
				return nil, err
			}
		}
		return f(ctx, a)
	}
}
