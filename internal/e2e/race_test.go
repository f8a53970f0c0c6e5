//go:build race

package e2e

// raceEnabled tells that everything takes about ten times as long.
const raceEnabled = true
