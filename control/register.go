package control

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Register asks the control server to accept a node, once; Version is filled
// in if it is 0. With Followup set it waits until the user is done, as long as
// ctx allows.
//
// Errors to branch on: *NeedsLoginError, *RefusedError (and the wire errors in
// it), wire.ErrNodeKeyExpired (make a new node key and register that),
// *UnreachableError (try again), ErrServerKeyMismatch, *StatusError.
func (c *Client) Register(ctx context.Context, req wire.RegisterRequest) (*wire.RegisterResponse, error) {
	limit := requestTime
	if req.Followup != "" {
		limit = 0
	}
	resp, err := c.register(ctx, req, limit)
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	code := resp.MeshCode
	if code.Err() == nil {
		code = ""
	}
	switch {
	case resp.AuthURL != "" && resp.Error == "":
		u, err := url.Parse(resp.AuthURL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || strings.ContainsFunc(resp.AuthURL, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return nil, errors.New("register: control server wants a login, but at a URL that makes no sense")
		}
		return nil, &NeedsLoginError{URL: resp.AuthURL}
	case resp.NodeKeyExpired && (code == "" || code == wire.CodeNodeKeyExpired):
		return nil, fmt.Errorf("register: %w", wire.ErrNodeKeyExpired)
	case resp.Error != "" || code != "":
		return nil, &RefusedError{Text: printable(resp.Error), Code: code}
	}
	return resp, nil
}

func (c *Client) register(ctx context.Context, req wire.RegisterRequest, limit time.Duration) (*wire.RegisterResponse, error) {
	ctx, cancel := c.during(ctx, limit)
	defer cancel(nil)
	if req.Version == 0 {
		req.Version = wire.CapabilityVersion
	}
	if req.Hostinfo == nil {
		req.Hostinfo = &wire.Hostinfo{}
	}
	req.MeshInstance = c.cfg.Instance
	var resp wire.RegisterResponse
	if err := c.exchange(ctx, "/machine/register", req, &resp); err != nil {
		return nil, err
	}
	return &resp, nil
}

// Logout tells the control server that the node with that key leaves. An
// ephemeral node is forgotten at once.
func (c *Client) Logout(ctx context.Context, key identity.NodePublic) error {
	resp, err := c.register(ctx, wire.RegisterRequest{NodeKey: key, Expiry: wire.LogoutExpiry}, requestTime)
	if err != nil {
		return fmt.Errorf("log out: %w", err)
	}
	// An answer that says that the key is expired is what we asked for.
	if resp.Error != "" && !resp.NodeKeyExpired && !errors.Is(resp.MeshCode.Err(), wire.ErrNodeUnknown) && !errors.Is(resp.MeshCode.Err(), wire.ErrNodeRevoked) {
		return fmt.Errorf("log out: %w", &RefusedError{Text: printable(resp.Error), Code: resp.MeshCode})
	}
	return nil
}

// Update tells the control server the node's present state: endpoints, relay,
// host. It does not disturb the map stream.
func (c *Client) Update(ctx context.Context, req wire.MapRequest) error {
	ctx, cancel := c.during(ctx, requestTime)
	defer cancel(nil)
	if req.Version == 0 {
		req.Version = wire.CapabilityVersion
	}
	req.Stream, req.OmitPeers, req.MeshInstance = false, true, c.cfg.Instance
	if err := c.exchange(ctx, "/machine/map", req, nil); err != nil {
		return fmt.Errorf("send update: %w", err)
	}
	return nil
}

// printable makes a text of the server's fit for errors and terminals.
func printable(s string) string {
	const most = 500
	if len(s) > most {
		s = s[:most]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, s)
}
