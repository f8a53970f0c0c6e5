package host

import (
	"testing"

	"go.uber.org/goleak"

	"mesh/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(pgtest.Runner{M: m}) }
