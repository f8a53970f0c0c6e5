package control

import (
	"errors"
	"net/http"
	"strings"

	"mesh/control/wire"
)

// Other control servers refuse in words alone. What they say is taken for one
// of our codes only where nothing else can be meant.
var foreignWords = map[string]wire.ErrorCode{
	"invalid pre auth key":                       wire.CodeAuthKeyUnknown,
	"invalid authkey":                            wire.CodeAuthKeyUnknown,
	"authkey expired":                            wire.CodeAuthKeyExpired,
	"authkey revoked":                            wire.CodeAuthKeyRevoked,
	"authkey already used":                       wire.CodeAuthKeyUsed,
	"node exists with a different machine key":   wire.CodeMachineMismatch,
	"node key already in use by another machine": wire.CodeMachineMismatch,
}

// foreignStatus is the same for what a map request is answered with.
var foreignStatus = map[string]wire.ErrorCode{
	"node not found":                 wire.CodeNodeUnknown,
	"node doesn't match machine key": wire.CodeMachineMismatch,
	"node key in request does not match the one associated with this machine key": wire.CodeMachineMismatch,
}

func foreignRefusal(text string) error {
	return foreignWords[strings.ToLower(strings.TrimSpace(text))].Err()
}

func foreignAnswer(status int, text string) error {
	if status != http.StatusNotFound && status != http.StatusBadRequest {
		return nil
	}
	return foreignStatus[strings.ToLower(strings.TrimSpace(text))].Err()
}

// forgotten reports whether err is the word of another implementation's server
// that it does not know the node. Such servers forget nodes that they would
// take back, when they are started without their memory.
func forgotten(err error) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == "" && errors.Is(s, wire.ErrNodeUnknown)
}
