//go:build !unix

package path

// canAwait says that sockets can be waited for without a buffer.
const canAwait = false

func readable(uintptr) bool { return true }
