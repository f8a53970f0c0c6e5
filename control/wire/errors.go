package wire

import "errors"

// ErrorCode names a refusal on the wire, so that both sides share one table
// and callers can branch with errors.Is. The zero value is no error.
type ErrorCode string

// The refusals of a control server.
const (
	CodeAuthKeyUnknown  ErrorCode = "auth-key-unknown"
	CodeAuthKeyExpired  ErrorCode = "auth-key-expired"
	CodeAuthKeyRevoked  ErrorCode = "auth-key-revoked"
	CodeAuthKeyUsed     ErrorCode = "auth-key-used"
	CodeMachineMismatch ErrorCode = "machine-mismatch"
	CodeNodeRevoked     ErrorCode = "node-revoked"
	CodeNodeKeyExpired  ErrorCode = "node-key-expired"
	CodeNodeUnknown     ErrorCode = "node-unknown"
	CodeTagNotAllowed   ErrorCode = "tag-not-allowed"
	CodeNeedsLogin      ErrorCode = "needs-login"
	CodeLoginRejected   ErrorCode = "login-rejected"
	CodeCloned          ErrorCode = "cloned"
	CodeVersionTooOld   ErrorCode = "version-too-old"
	CodeRelayKeyUnknown ErrorCode = "relay-key-unknown"
	CodeAddressesUsedUp ErrorCode = "addresses-used-up"
	CodeUserSuspended   ErrorCode = "user-suspended"
)

// Errors behind the codes. Their texts say what to do next.
var (
	ErrAuthKeyUnknown  = errors.New("unknown auth key: check it, or create one with `mesh key create`")
	ErrAuthKeyExpired  = errors.New("auth key expired: create a new one with `mesh key create`")
	ErrAuthKeyRevoked  = errors.New("auth key revoked: ask for a new one")
	ErrAuthKeyUsed     = errors.New("auth key already used: it was good for one node; create another, or one with --reusable")
	ErrMachineMismatch = errors.New("node key belongs to another machine: the state was copied; enrol this one anew")
	ErrNodeRevoked     = errors.New("node was removed from the mesh by an administrator")
	ErrNodeKeyExpired  = errors.New("node key expired: log in again")
	ErrNodeUnknown     = errors.New("control server does not know this node: enrol it")
	ErrTagNotAllowed   = errors.New("tag not allowed for this key")
	ErrNeedsLogin      = errors.New("login needed: no valid identity and no auth key")
	ErrLoginRejected   = errors.New("login was rejected by an administrator")
	ErrCloned          = errors.New("another copy of this node's identity is running: the newer one stays")
	ErrVersionTooOld   = errors.New("client is too old for this control server")
	ErrRelayKeyUnknown = errors.New("unknown relay key: create one with `mesh key create --relay`")
	ErrAddressesUsedUp = errors.New("no free mesh address left")
	ErrUserSuspended   = errors.New("the user whom this node belongs to is suspended by an administrator")
)

var byCode = map[ErrorCode]error{
	CodeAuthKeyUnknown:  ErrAuthKeyUnknown,
	CodeAuthKeyExpired:  ErrAuthKeyExpired,
	CodeAuthKeyRevoked:  ErrAuthKeyRevoked,
	CodeAuthKeyUsed:     ErrAuthKeyUsed,
	CodeMachineMismatch: ErrMachineMismatch,
	CodeNodeRevoked:     ErrNodeRevoked,
	CodeNodeKeyExpired:  ErrNodeKeyExpired,
	CodeNodeUnknown:     ErrNodeUnknown,
	CodeTagNotAllowed:   ErrTagNotAllowed,
	CodeNeedsLogin:      ErrNeedsLogin,
	CodeLoginRejected:   ErrLoginRejected,
	CodeCloned:          ErrCloned,
	CodeVersionTooOld:   ErrVersionTooOld,
	CodeRelayKeyUnknown: ErrRelayKeyUnknown,
	CodeAddressesUsedUp: ErrAddressesUsedUp,
	CodeUserSuspended:   ErrUserSuspended,
}

// Err returns the error behind c, or nil if c is empty or unknown to us.
func (c ErrorCode) Err() error { return byCode[c] }

// CodeOf returns the code of the first known error in err's chain, or "".
func CodeOf(err error) ErrorCode {
	for c, e := range byCode {
		if errors.Is(err, e) {
			return c
		}
	}
	return ""
}

// ErrorHeader is the HTTP header of a refused request (status 4xx) that holds
// the ErrorCode; the body is the text for people.
const ErrorHeader = "Mesh-Error-Code"
