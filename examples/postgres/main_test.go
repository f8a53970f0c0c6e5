package main

import (
	"testing"

	"go.uber.org/goleak"
)

func TestRun(t *testing.T) {
	if _, err := findServer(); err != nil {
		t.Skip(err)
	}
	defer goleak.VerifyNone(t)
	if err := run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
