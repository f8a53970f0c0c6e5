//go:build !race

package tunnel

const raceEnabled = false

// unlessRace is the smaller number where the race detector makes all slow.
func unlessRace(n, _ int) int { return n }
