package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/internal/backoff"
)

// followTime bounds one request that waits for a person to log in; then it is
// made again.
const followTime = 10 * time.Minute

// passLogin waits until a person has logged in, if that is what err, of
// register, asks for. Other errors it returns as they are.
func (s *Session) passLogin(e *enrolment, err error) error {
	var login *control.NeedsLoginError
	if !errors.As(err, &login) || s.ctx.Err() != nil {
		return err
	}
	defer s.setLogin(nil)
	var wait backoff.Backoff
	for {
		s.setLogin(e.because(login))
		req := e.asked
		req.Auth, req.Followup = nil, login.URL
		ctx, cancel := context.WithTimeout(s.ctx, followTime)
		resp, err := e.server.Register(ctx, req)
		waited := ctx.Err() != nil
		cancel()
		var next *control.NeedsLoginError
		switch {
		case err == nil:
			return e.accepted(resp)
		case s.ctx.Err() != nil:
			return context.Cause(s.ctx)
		case waited:
			continue
		case errors.As(err, &next):
			login = next // perhaps the same: it only waits for so long
		case worthRetry(err):
			s.log.Debug("waiting for the login, will try again", zap.Error(err))
		default:
			return e.refused(err)
		}
		if err := wait.Wait(s.ctx, control.RetryAfter(err), nil, nil); err != nil {
			return err
		}
	}
}

// setLogin says that a person has to log in, or with nil that nobody has to.
func (s *Session) setLogin(err error) {
	s.mu.Lock()
	news := err != nil && (s.login == nil || s.login.Error() != err.Error())
	if news || err == nil && s.login != nil {
		s.login = err
		s.turn()
	}
	s.mu.Unlock()
	if news {
		s.log.Warn("this node waits for a person", zap.Error(err))
	}
}

// bar keeps a node that is up from use, for that reason; nil lets it in again.
func (s *Session) bar(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.barred = why
	s.turn()
}

func (s *Session) isBarred() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.barred
}

// pendingLogin returns where a person has to log in; a nil error means that
// nobody has to.
func (s *Session) pendingLogin() (url string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var login *control.NeedsLoginError
	if errors.As(s.login, &login) {
		url = login.URL
	}
	return url, s.login
}

// turn wakes those who wait. The caller holds mu.
func (s *Session) turn() {
	close(s.turned)
	s.turned = make(chan struct{})
}

// Wait waits until the session can be used or has ended. When ctx ends first
// the error says what is being waited for. That a person has to log in is an
// error at once.
func (s *Session) Wait(ctx context.Context) error { return s.wait(ctx, false, false) }

// WaitLogin is Wait, but waits also for a person to log in, once it has said
// where: each *control.NeedsLoginError is returned to one call.
func (s *Session) WaitLogin(ctx context.Context) error { return s.wait(ctx, true, false) }

// WaitStack waits until there is a stack to listen on, which a node keeps whose
// key has to be renewed.
func (s *Session) WaitStack(ctx context.Context) error { return s.wait(ctx, false, true) }

func (s *Session) wait(ctx context.Context, patient, stackOnly bool) error {
	for {
		s.mu.Lock()
		login, barred, stale, turned := s.login, s.barred, s.stale, s.turned
		tell := login != nil && (!patient || s.loginTold != login)
		if tell && patient {
			s.loginTold = login
		}
		s.mu.Unlock()
		up := s.up
		if s.WasUp() {
			up = nil
		}
		select {
		case <-s.ended:
			return s.Err()
		default:
		}
		switch {
		case up == nil && stale != nil && !stackOnly:
			return stale
		case up == nil && (barred == nil || stackOnly):
			return nil
		case tell:
			return login
		}
		select {
		case <-up:
		case <-turned:
		case <-s.ended:
		case <-ctx.Done():
			// A failure that is already there says more than the deadline.
			select {
			case <-s.ended:
				return s.Err()
			default:
			}
			return s.stillWaiting(context.Cause(ctx))
		}
	}
}

// stillWaiting says what was waited for when time ran out.
func (s *Session) stillWaiting(cause error) error {
	s.mu.Lock()
	login, barred, trouble := s.login, s.barred, s.trouble
	s.mu.Unlock()
	switch {
	case login != nil:
		return fmt.Errorf("coming up: %w; %w", cause, login)
	case errors.Is(barred, ErrNotApproved):
		return fmt.Errorf("coming up: %w; %w", cause, barred)
	case barred != nil && trouble != nil:
		return fmt.Errorf("renewing the node key: %w; %w; last: %w", cause, barred, trouble)
	case barred != nil:
		return fmt.Errorf("renewing the node key: %w; %w", cause, barred)
	case trouble != nil:
		return fmt.Errorf("coming up: %w; last: %w", cause, trouble)
	}
	return fmt.Errorf("coming up: waiting for control server %s: %w", s.cfg.ControlURL, cause)
}
