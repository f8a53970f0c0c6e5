package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// Client talks to the admin API. Its methods may be called concurrently.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client for the unix socket at path. It opens connections
// when they are needed and keeps none.
func NewClient(path string) *Client {
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// do sends in as JSON (nil = no body) and decodes the answer into out (nil =
// ignore it).
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("admin request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+Host+path, body)
	if err != nil {
		return fmt.Errorf("admin request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return fmt.Errorf("no server answers at %s (is `mesh serve` running with this --data directory?): %w", c.path, op.Err)
		}
		return fmt.Errorf("admin request: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody+1))
	if err != nil {
		return fmt.Errorf("admin answer: %w", err)
	}
	if len(b) > MaxBody {
		return errors.New("admin answer is too long")
	}
	if resp.StatusCode/100 != 2 {
		e := &Error{Status: resp.StatusCode}
		if json.Unmarshal(b, e) != nil || e.Message == "" {
			e.Message = fmt.Sprintf("server answered with HTTP status %d", resp.StatusCode)
		}
		return e
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("admin answer: %w", err)
	}
	return nil
}

func get[T any](ctx context.Context, c *Client, method, path string, in any) (out T, err error) {
	err = c.do(ctx, method, path, in, &out)
	return out, err
}

// Status describes the server.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "GET", "/v1/status", nil)
}

// CreateUser adds a user; the first one is owner. ErrConflict: the name is
// taken.
func (c *Client) CreateUser(ctx context.Context, name string) (User, error) {
	return get[User](ctx, c, "POST", "/v1/users", UserCreate{name})
}

// Users lists all users.
func (c *Client) Users(ctx context.Context) ([]User, error) {
	return get[[]User](ctx, c, "GET", "/v1/users", nil)
}

// RemoveUser removes a user and its keys. ErrConflict: it still has nodes.
func (c *Client) RemoveUser(ctx context.Context, name string) error {
	return c.do(ctx, "DELETE", "/v1/users/"+url.PathEscape(name), nil, nil)
}

// wait is the part of a URL that asks the server to wait for peers.
func wait(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return "&wait=" + url.QueryEscape(d.String())
}

// SuspendUser cuts off all nodes of a user and refuses them and the user's keys,
// until ResumeUser. With a wait (25 s at most) it returns when all peers have
// that in force, or the wait is over, and User.Applied tells.
func (c *Client) SuspendUser(ctx context.Context, name string, limit time.Duration) (User, error) {
	return get[User](ctx, c, "POST", "/v1/users/"+url.PathEscape(name)+"/suspend?"+wait(limit), nil)
}

// ResumeUser ends SuspendUser: the nodes are what they were.
func (c *Client) ResumeUser(ctx context.Context, name string) (User, error) {
	return get[User](ctx, c, "POST", "/v1/users/"+url.PathEscape(name)+"/resume", nil)
}

// CreateKey makes an enrolment key. Its secret is in the answer and nowhere
// else.
func (c *Client) CreateKey(ctx context.Context, k KeyCreate) (NewKey, error) {
	return get[NewKey](ctx, c, "POST", "/v1/keys", k)
}

// Keys lists all keys, without secrets.
func (c *Client) Keys(ctx context.Context) ([]Key, error) {
	return get[[]Key](ctx, c, "GET", "/v1/keys", nil)
}

// RevokeKey makes a key useless. Nodes that enrolled with it stay; a relay that
// uses it is cut off.
func (c *Client) RevokeKey(ctx context.Context, id int64) (Key, error) {
	return get[Key](ctx, c, "POST", "/v1/keys/"+strconv.FormatInt(id, 10)+"/revoke", nil)
}

// RevokeKeyAndNodes is RevokeKey, and RemoveNode of all nodes that enrolled with
// the key. It waits as SuspendUser does.
func (c *Client) RevokeKeyAndNodes(ctx context.Context, id int64, limit time.Duration) (Key, error) {
	return get[Key](ctx, c, "POST", "/v1/keys/"+strconv.FormatInt(id, 10)+"/revoke?nodes=1"+wait(limit), nil)
}

// Nodes lists all nodes.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	return get[[]Node](ctx, c, "GET", "/v1/nodes", nil)
}

// Node returns the node with the given name, full name, stable ID or mesh
// address.
func (c *Client) Node(ctx context.Context, name string) (Node, error) {
	return get[Node](ctx, c, "GET", "/v1/nodes/"+url.PathEscape(name), nil)
}

// RemoveNode revokes a node, named as for Node: it is cut off at once and
// cannot come back without another auth key.
func (c *Client) RemoveNode(ctx context.Context, name string) error {
	return c.do(ctx, "DELETE", "/v1/nodes/"+url.PathEscape(name), nil, nil)
}

// RemoveNodeAndWait is RemoveNode, and waits as SuspendUser does.
func (c *Client) RemoveNodeAndWait(ctx context.Context, name string, limit time.Duration) (NodeRemoved, error) {
	return get[NodeRemoved](ctx, c, "DELETE", "/v1/nodes/"+url.PathEscape(name)+"?"+wait(limit), nil)
}

// RenameNode gives a node, named as for Node, another name, or with "" the one
// that its host has. ErrConflict: another node has it.
func (c *Client) RenameNode(ctx context.Context, name, to string) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/nodes/"+url.PathEscape(name)+"/rename", NodeRename{to})
}

// SetNodeOwner gives a node, named as for Node, to a user or to tags.
func (c *Client) SetNodeOwner(ctx context.Context, name string, owner NodeOwner) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/nodes/"+url.PathEscape(name)+"/owner", owner)
}

// ExpireNode sets when the key of a node, named as for Node, expires.
func (c *Client) ExpireNode(ctx context.Context, name string, when NodeExpire) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/nodes/"+url.PathEscape(name)+"/expire", when)
}

// ExpireNodeAndWait is ExpireNode, and waits as SuspendUser does.
func (c *Client) ExpireNodeAndWait(ctx context.Context, name string, when NodeExpire, limit time.Duration) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/nodes/"+url.PathEscape(name)+"/expire?"+wait(limit), when)
}

// Logins lists the machines that ask to be let in, oldest first.
func (c *Client) Logins(ctx context.Context) ([]Login, error) {
	return get[[]Login](ctx, c, "GET", "/v1/logins", nil)
}

// ApproveLogin lets a machine in, for a user or with tags. ErrConflict: it was
// decided already.
func (c *Client) ApproveLogin(ctx context.Context, code string, owner NodeOwner) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/logins/"+url.PathEscape(code)+"/approve", owner)
}

// RejectLogin turns a machine away.
func (c *Client) RejectLogin(ctx context.Context, code string) error {
	return c.do(ctx, "POST", "/v1/logins/"+url.PathEscape(code)+"/reject", nil, nil)
}

// Policy returns the policy in force. Its version is 0 if there is none.
func (c *Client) Policy(ctx context.Context) (Policy, error) {
	return get[Policy](ctx, c, "GET", "/v1/policy", nil)
}

// SetPolicy brings a policy in force. ErrInvalid: it is not a valid one.
func (c *Client) SetPolicy(ctx context.Context, p PolicySet) (Policy, error) {
	return get[Policy](ctx, c, "PUT", "/v1/policy", p)
}

// CheckPolicy checks a policy as SetPolicy does and returns warnings.
func (c *Client) CheckPolicy(ctx context.Context, text string) ([]string, error) {
	p, err := get[Policy](ctx, c, "POST", "/v1/policy/check", PolicySet{Text: text})
	return p.Warnings, err
}

// PolicyVersion returns one version of the policy.
func (c *Client) PolicyVersion(ctx context.Context, version int64) (Policy, error) {
	return get[Policy](ctx, c, "GET", "/v1/policy?version="+strconv.FormatInt(version, 10), nil)
}

// PolicyHistory lists the newest versions, newest first, without their texts.
func (c *Client) PolicyHistory(ctx context.Context) ([]Policy, error) {
	return get[[]Policy](ctx, c, "GET", "/v1/policy/versions", nil)
}

// RollbackPolicy brings the text of an older version in force again.
func (c *Client) RollbackPolicy(ctx context.Context, r PolicyRollback) (Policy, error) {
	return get[Policy](ctx, c, "POST", "/v1/policy/rollback", r)
}

// Topology returns who is in the mesh, as policies see it.
func (c *Client) Topology(ctx context.Context) (Topology, error) {
	return get[Topology](ctx, c, "GET", "/v1/topology", nil)
}

// AddGrant gives access for a time.
func (c *Client) AddGrant(ctx context.Context, g GrantAdd) (Grant, error) {
	return get[Grant](ctx, c, "POST", "/v1/grants", g)
}

// Grants lists the grants in force, oldest first; with all the newest of those
// that ended, too.
func (c *Client) Grants(ctx context.Context, all bool) ([]Grant, error) {
	path := "/v1/grants"
	if all {
		path += "?all=1"
	}
	return get[[]Grant](ctx, c, "GET", path, nil)
}

// RevokeGrant ends a grant. ErrConflict: it has ended already.
func (c *Client) RevokeGrant(ctx context.Context, id int64) (Grant, error) {
	return get[Grant](ctx, c, "DELETE", "/v1/grants/"+strconv.FormatInt(id, 10), nil)
}

// Shadow returns the candidate beside the policy. Its text is "" if there is
// none.
func (c *Client) Shadow(ctx context.Context) (Policy, error) {
	return get[Policy](ctx, c, "GET", "/v1/policy/shadow", nil)
}

// SetShadow puts a candidate beside the policy and starts a new report.
func (c *Client) SetShadow(ctx context.Context, text string) (Policy, error) {
	return get[Policy](ctx, c, "PUT", "/v1/policy/shadow", PolicySet{Text: text})
}

// ClearShadow takes the candidate away, and its report.
func (c *Client) ClearShadow(ctx context.Context) error {
	return c.do(ctx, "DELETE", "/v1/policy/shadow", nil, nil)
}

// ShadowReport tells what the candidate would decide otherwise. ErrNotFound:
// there is none.
func (c *Client) ShadowReport(ctx context.Context) (ShadowReport, error) {
	return get[ShadowReport](ctx, c, "GET", "/v1/policy/shadow/report", nil)
}

// ApproveRoutes sets which routes of a node, named as for Node, an
// administrator approves.
func (c *Client) ApproveRoutes(ctx context.Context, name string, approved []netip.Prefix) (Node, error) {
	return get[Node](ctx, c, "POST", "/v1/nodes/"+url.PathEscape(name)+"/routes", NodeRoutes{approved})
}

// Relays lists the relay map.
func (c *Client) Relays(ctx context.Context) ([]Relay, error) {
	return get[[]Relay](ctx, c, "GET", "/v1/relays", nil)
}

// RemoveRelay takes the relay with a name, or all of the region with a number,
// out of the map and cuts them off from the members.
func (c *Client) RemoveRelay(ctx context.Context, name string) error {
	return c.do(ctx, "DELETE", "/v1/relays/"+url.PathEscape(name), nil, nil)
}

// Audit returns what changed since a time and follows the entry with the ID
// after (0 = all), oldest first, MaxAudit entries at most.
func (c *Client) Audit(ctx context.Context, since time.Time, after int64) ([]AuditEntry, error) {
	q := url.Values{"since": {since.UTC().Format(time.RFC3339Nano)}, "after": {strconv.FormatInt(after, 10)}}
	return get[[]AuditEntry](ctx, c, "GET", "/v1/audit?"+q.Encode(), nil)
}

// AuditHead names the newest entry of the audit record.
func (c *Client) AuditHead(ctx context.Context) (AuditHead, error) {
	return get[AuditHead](ctx, c, "GET", "/v1/audit/head", nil)
}

// Backup copies the server's data to a file of its machine. ErrConflict: it
// could not be written, or is there already.
func (c *Client) Backup(ctx context.Context, in Backup) error {
	return c.do(ctx, http.MethodPost, "/v1/backup", in, nil)
}
