//go:build race

package tunnel

const raceEnabled = true

// unlessRace is the smaller number where the race detector makes all slow.
func unlessRace(_, n int) int { return n }
