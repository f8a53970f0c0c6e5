package main

import (
	"testing"

	"go.uber.org/goleak"

	"mesh/internal/pgserver"
)

func TestRun(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		t.Skip(err)
	}
	defer goleak.VerifyNone(t)
	if err := run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
