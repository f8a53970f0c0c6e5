//go:build !linux

package hostaddr

import "errors"

// listen is known on Linux only.
func listen(func(Change)) (end func(), err error) { return nil, errors.ErrUnsupported }
