package netstack

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/log"
)

// quiet keeps gVisor from writing to the program's standard error, which it
// does for some packets of strangers and races that mean nothing. Its logger is
// one for the whole process; a library has no business on it.
var quiet = sync.OnceFunc(func() { log.SetTarget(silence{}) })

type silence struct{}

func (silence) Emit(int, log.Level, time.Time, string, ...any) {}
