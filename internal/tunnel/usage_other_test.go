//go:build !unix

package tunnel

func cpuTime() float64 { return 0 } // not known
