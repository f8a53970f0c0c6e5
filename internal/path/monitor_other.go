//go:build !linux

package path

import "errors"

// watchNetwork is known on Linux only; elsewhere interfaces are looked at now
// and then.
func watchNetwork() (*networkEvents, error) { return nil, errors.ErrUnsupported }
