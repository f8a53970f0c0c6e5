package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// ErrClosed reports the use of a Client after Close.
var ErrClosed = errors.New("control client is closed")

// ErrUnproven reports a control server whose key nobody vouches for: it is
// reached over plain HTTP beyond this host, and the key is not pinned.
var ErrUnproven = errors.New("plain HTTP does not prove who answers: use https, or pin the server's key, which `mesh serve` prints")

// ErrServerKeyMismatch reports that the control server does not hold the key
// that Config.ServerKey pins.
var ErrServerKeyMismatch = errors.New("control server key mismatch")

// ServerKeyError is an ErrServerKeyMismatch with the keys.
type ServerKeyError struct {
	Pinned identity.MachinePublic
	Got    identity.MachinePublic // as the server says, unproven; zero = unknown
}

// Error names both keys by their short forms, and what to do.
func (e *ServerKeyError) Error() string {
	got := "another one"
	if !e.Got.IsZero() {
		got = e.Got.Short()
	}
	return fmt.Sprintf("%v: the pinned key is %s, the server has %s: if the server was set up anew, pin its new key; if not, something else answers at its address",
		ErrServerKeyMismatch, e.Pinned.Short(), got)
}

// Unwrap returns ErrServerKeyMismatch.
func (e *ServerKeyError) Unwrap() error { return ErrServerKeyMismatch }

// UnreachableError reports that the control server could not be talked to. It
// is worth trying again.
type UnreachableError struct {
	URL string // of the control server
	Err error  // why
}

// Error says why.
func (e *UnreachableError) Error() string { return "control server unreachable: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// NeedsLoginError reports that a user has to visit URL. To wait for that, send
// the same request with its Followup set to URL. It is a wire.ErrNeedsLogin.
type NeedsLoginError struct{ URL string }

// Error names the URL.
func (e *NeedsLoginError) Error() string { return "login needed: visit " + e.URL }

// Unwrap returns wire.ErrNeedsLogin.
func (e *NeedsLoginError) Unwrap() error { return wire.ErrNeedsLogin }

// RefusedError is a control server's refusal to register a node.
type RefusedError struct {
	Text string         // in the server's words
	Code wire.ErrorCode // "" if the server gave none that we know
}

// Error returns what the code stands for, else the server's words.
func (e *RefusedError) Error() string {
	if err := e.Code.Err(); err != nil {
		return "registration refused: " + err.Error()
	}
	return "registration refused: " + e.Text
}

// Unwrap returns the error behind the code, such as wire.ErrAuthKeyUsed, or
// behind the words that other control servers use.
func (e *RefusedError) Unwrap() error {
	if err := e.Code.Err(); err != nil {
		return err
	}
	return foreignRefusal(e.Text)
}

// StatusError is an HTTP status other than 200.
type StatusError struct {
	Status     int
	Code       wire.ErrorCode // "" if the server gave none that we know
	Text       string         // start of the body, in the server's words
	RetryAfter time.Duration  // 0 = the server did not say
}

// Error returns what the code stands for, else status and text.
func (e *StatusError) Error() string {
	if err := e.Code.Err(); err != nil {
		return fmt.Sprintf("%v (HTTP status %d)", err, e.Status)
	}
	if e.Text == "" {
		return fmt.Sprintf("control server answered HTTP status %d", e.Status)
	}
	return fmt.Sprintf("control server answered HTTP status %d: %q", e.Status, e.Text)
}

// Unwrap returns the error behind the code, such as wire.ErrNodeRevoked, or
// behind the words that other control servers use.
func (e *StatusError) Unwrap() error {
	if err := e.Code.Err(); err != nil {
		return err
	}
	return foreignAnswer(e.Status, e.Text)
}

// fatal lists what trying again does not mend.
var fatal = []error{
	wire.ErrMachineMismatch, wire.ErrNodeRevoked, wire.ErrNodeKeyExpired, wire.ErrNodeUnknown, wire.ErrNeedsLogin,
	wire.ErrCloned, wire.ErrVersionTooOld, wire.ErrRelayKeyUnknown, ErrClosed,
}

// IsFatal reports whether err says that the control server does not want this
// node (or relay) as it is, so that trying again is of no use.
func IsFatal(err error) bool {
	for _, f := range fatal {
		if errors.Is(err, f) {
			return true
		}
	}
	return false
}

// IsTemporary reports whether err may pass by itself: the control server does
// not answer, is busy, or is in trouble.
func IsTemporary(err error) bool {
	var unreachable *UnreachableError
	var status *StatusError
	return errors.As(err, &unreachable) ||
		errors.As(err, &status) && (status.Status >= 500 || status.Status == http.StatusTooManyRequests)
}

// RetryAfter returns how long the server that err came from asked to wait, 0 if
// it did not.
func RetryAfter(err error) time.Duration {
	var restart *restartError
	if errors.As(err, &restart) {
		return restart.after
	}
	var s *StatusError
	if !errors.As(err, &s) {
		return 0
	}
	if s.RetryAfter == 0 && (s.Status == http.StatusTooManyRequests || s.Status == http.StatusServiceUnavailable) {
		return defaultRetryAfter
	}
	return s.RetryAfter
}

const defaultRetryAfter = 5 * time.Second

// because replaces an error that only says that ctx ended by the reason for
// which it did. The reason never stands alone: it names the server, and the
// error if that says more.
func (c *Client) because(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case c.life.Err() != nil: // which ctx may not have heard of yet
		return ErrClosed
	case ctx.Err() == nil:
		return err
	}
	cause := context.Cause(ctx)
	own := cause != context.Canceled && cause != context.DeadlineExceeded
	switch {
	case errors.Is(err, cause) && strings.Contains(err.Error(), c.base):
		return err
	case own:
		return cause
	case errors.Is(err, cause):
		return fmt.Errorf("waiting for control server %s: %w", c.base, err)
	default:
		return fmt.Errorf("waiting for control server %s: %w; last: %w", c.base, cause, err)
	}
}

// unreachable wraps what failed on the way to the server, unless ctx ended.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil || c.life.Err() != nil {
		return c.because(ctx, err)
	}
	return &UnreachableError{c.base, err}
}
