package main

import (
	"testing"

	"mesh/internal/interop/stock/suite"
)

// TestInterop runs the suite of package mesh/internal/interop against this
// stock version. MESH_INTEROP_RUN narrows it to tests that match.
func TestInterop(t *testing.T) { suite.Run(t) }

// TestGrid compares the paths that this stock version and ours find through
// translating routers.
func TestGrid(t *testing.T) { suite.RunGrid(t) }
