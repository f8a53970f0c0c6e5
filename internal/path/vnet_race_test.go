//go:build race

package path_test

// With the race detector each cell of the grid is started one way, not three:
// it makes everything ten times slower, and finds what it finds in few cells.
const raceDetector = true
