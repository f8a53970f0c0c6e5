package e2e

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"mesh/internal/actor"
	"mesh/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) {
	actor.Perform()
	goleak.VerifyTestMain(pgtest.Runner{M: m})
}

// full tells whether the long forms of tests run, as in .ci/full.
func full() bool { return os.Getenv("MESH_FULL") == "1" }
