package load

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Usage is what a process has used so far and holds at present.
type Usage struct {
	CPU        float64 // seconds, user and system
	Heap       float64 // bytes live; only after a collection
	RSS, Peak  float64 // bytes; Peak is the highest so far
	Goroutines float64
	Files      float64
	Sockets    float64 // those of Files that are sockets of the internet
}

// UsageArgs say whether to wait until the process is at rest, collect garbage and
// give memory back first.
type UsageArgs struct{ Collect bool }

// rest is how long a process has before what it holds counts as held: buffers may
// be kept for a second or two after use.
const rest = 3 * time.Second

func (a *agent) usage(_ context.Context, u UsageArgs) (any, error) {
	if u.Collect {
		time.Sleep(rest)
		runtime.GC()
		debug.FreeOSMemory()
	}
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return nil, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	out := Usage{
		CPU:        time.Duration(r.Utime.Nano() + r.Stime.Nano()).Seconds(),
		Heap:       float64(m.HeapAlloc),
		Goroutines: float64(runtime.NumGoroutine()),
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[2] == "kB" {
			v, _ := strconv.ParseFloat(f[1], 64)
			switch f[0] {
			case "VmRSS:":
				out.RSS = v * 1024
			case "VmHWM:":
				out.Peak = v * 1024
			}
		}
	}
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	out.Files = float64(len(dir))
	for _, e := range dir {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "socket:") {
			out.Sockets++
		}
	}
	return out, nil
}

// ProfileArgs say for how long to profile the CPU, and where to write it.
type ProfileArgs struct {
	File    string
	Seconds float64
}

func (a *agent) profile(_ context.Context, p ProfileArgs) (any, error) {
	var b bytes.Buffer
	if err := pprof.StartCPUProfile(&b); err != nil {
		return nil, err
	}
	time.Sleep(time.Duration(p.Seconds * float64(time.Second)))
	pprof.StopCPUProfile()
	if err := os.WriteFile(p.File, b.Bytes(), 0o644); err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return nil, nil
}
