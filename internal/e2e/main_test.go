package e2e

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"mesh/internal/actor"
)

func TestMain(m *testing.M) {
	actor.Perform()
	goleak.VerifyTestMain(m)
}

// full tells whether the long forms of tests run, as in .ci/full.
func full() bool { return os.Getenv("MESH_FULL") == "1" }
