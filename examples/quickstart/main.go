// Quickstart runs a whole mesh on this machine and tells what happens: a
// control plane, a relay and three agents, each a process of its own.
//
//	go run ./examples/quickstart
//
// The agents are a planner, a database and an image tool. The planner may query
// the database (port 5432) and use the image tool (8080); the image tool may read
// the database's metrics (9187); nothing else is allowed. The story shows who
// called whom, with which proven identity and by which rule, a call that is
// refused, the control plane dying while calls go on, and an agent that is
// thrown out in the middle of a connection. Exit status 0 says that all of it
// was observed.
//
// Read agents.go to see how an agent uses the library. main.go is the story,
// servers.go the control plane and the relay, process.go starts the processes.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"mesh/control/admin"
)

// policy is in force from the start. Rules are named by their place and line.
const policy = `{
	"tagOwners": {"tag:planner": [], "tag:database": [], "tag:image": []},
	"acls": [
		{"action": "accept", "src": ["tag:planner"], "dst": ["tag:database:5432", "tag:image:8080"]},
		{"action": "accept", "src": ["tag:image"], "dst": ["tag:database:9187"]},
	],
}
`

// patience is how long the whole story may take before it is given up.
const patience = 90 * time.Second

func main() {
	if role := os.Getenv("QUICKSTART_ROLE"); role != "" {
		os.Exit(child(role)) // one of the processes of the story
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done within %v", patience))
	s := &story{ctx: ctx, out: newPrinter(os.Stdout), started: time.Now()}
	err := s.run()
	cancel()
	stop()
	os.Exit(s.end(err))
}

// story is the parent of all processes.
type story struct {
	ctx     context.Context
	out     *printer
	started time.Time
	missed  []string // what should have been observed and was not

	dir      string
	children []*process // running, in the order of starting
	control  *process
	admin    *admin.Client
	listen   string // where control listens, once it did

	relay, planner, database, image *process
}

// run tells the story. Its error is about what made it impossible to go on.
func (s *story) run() (err error) {
	if s.dir, err = os.MkdirTemp("", "mesh"); err != nil {
		return err
	}
	defer os.RemoveAll(s.dir)
	defer s.stopAll()
	s.out.title("Three agents, a relay and a control plane: five processes, one private network.")
	for _, chapter := range []func() error{s.start, s.allowed, s.refused, s.withoutControl, s.revoked} {
		if err := chapter(); err != nil {
			return err
		}
	}
	return nil
}

// end says how it went and returns the exit status.
func (s *story) end(err error) int {
	took := time.Since(s.started).Seconds()
	if err != nil {
		s.missed = append(s.missed, "the rest of the story: "+err.Error())
	}
	if len(s.missed) == 0 {
		s.out.title("All of this was observed, in %.1f s. agents.go shows how an agent does it.", took)
		return 0
	}
	s.out.title("NOT observed:")
	for _, m := range s.missed {
		s.out.line("  - %s", m)
	}
	return 1
}

// want notes what was not observed.
func (s *story) want(ok bool, format string, args ...any) {
	if !ok {
		s.missed = append(s.missed, fmt.Sprintf(format, args...))
	}
}

// processLine is name, process number, address and more.
const processLine = "  %-9s pid %-7d %-23s %s"

// start brings up the five processes.
func (s *story) start() (err error) {
	s.out.title("Processes")
	if err := s.startControl(); err != nil {
		return err
	}
	s.out.line(processLine, "control", s.control.pid(), s.control.first.URL, "knows who may reach whom, sees no data")
	p, err := s.admin.SetPolicy(s.ctx, admin.PolicySet{Text: policy})
	if err != nil {
		return err
	}
	key, err := s.admin.CreateKey(s.ctx, admin.KeyCreate{Relay: true})
	if err != nil {
		return err
	}
	if s.relay, err = s.startChild("relay",
		"MESH_CONTROL_URL="+s.control.first.URL,
		"MESH_CONTROL_KEY="+s.control.first.Key,
		"MESH_RELAY_KEY="+key.Secret,
		"QUICKSTART_DIR="+filepath.Join(s.dir, "relay"),
	); err != nil {
		return err
	}
	s.out.line(processLine, "relay", s.relay.pid(), s.relay.first.Addr, "passes on ciphertext where no direct path exists")
	// The planner, who calls first, comes last: a node that comes up knows all
	// peers that are there, and hears of later ones a moment after.
	for _, agent := range []struct {
		role   string
		job    string
		handle **process
	}{
		{"database", "queries on 5432, metrics on 9187", &s.database},
		{"image", "renders on 8080", &s.image},
		{"planner", "calls the others", &s.planner},
	} {
		if *agent.handle, err = s.startAgent(agent.role); err != nil {
			return err
		}
		a := *agent.handle
		s.out.line(processLine, agent.role, a.pid(), a.first.Addr, strings.Join(a.first.Tags, " ")+", "+agent.job)
	}
	s.out.title("Policy, version %d; what it does not name is denied", p.Version)
	for i, text := range strings.Split(policy, "\n") {
		if strings.Contains(text, "accept") {
			s.out.line("  line %d: %s", i+1, shorten(text))
		}
	}
	return nil
}

// startAgent gives an agent a key that carries its tag, and starts it as anybody
// would start an agent: all that the library needs is in its environment.
func (s *story) startAgent(role string) (*process, error) {
	key, err := s.admin.CreateKey(s.ctx, admin.KeyCreate{Tags: []string{"tag:" + role}})
	if err != nil {
		return nil, err
	}
	return s.startChild(role,
		"MESH_CONTROL_URL="+s.control.first.URL,
		"MESH_CONTROL_KEY="+s.control.first.Key,
		"MESH_AUTHKEY="+key.Secret,
		"MESH_HOSTNAME="+role,
		"MESH_STATE_DIR="+filepath.Join(s.dir, role),
	)
}

// startControl starts the control plane, again where it was if it ran before.
func (s *story) startControl() (err error) {
	s.control, err = s.startChild("control", "QUICKSTART_DIR="+filepath.Join(s.dir, "control"), "QUICKSTART_LISTEN="+s.listen)
	if err != nil {
		return err
	}
	s.listen = s.control.first.Addr
	s.admin = admin.NewClient(s.control.first.Socket)
	return nil
}

// allowed makes the calls of the policy.
func (s *story) allowed() error {
	s.out.title("Calls that the policy allows (time to connect and get an answer)")
	for _, call := range []struct {
		from, to *process
		order    order
		rule     string
	}{
		{s.planner, s.database, order{Do: doAsk, Addr: "database:5432", Say: "select count(*) from jobs"}, "acls[0]"},
		{s.planner, s.image, order{Do: doGet, Addr: "image:8080", Say: "/render?size=64"}, "acls[0]"},
		{s.image, s.database, order{Do: doAsk, Addr: "database:9187", Say: "requests_total"}, "acls[1]"},
	} {
		if err := s.call(call.from, call.to, call.order, call.rule); err != nil {
			return err
		}
	}
	return nil
}

// call makes one call and shows it from both ends.
func (s *story) call(from, to *process, o order, rule string) error {
	r, err := from.do(s.ctx, o)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%s → %s", from.role, o.Addr)
	if r.Error != "" {
		s.out.bad("failed", "%-28s %s", name, millis(r.Took))
		s.out.detail("%s", r.Error)
		s.want(false, "%s: a call that the policy allows", name)
		return nil
	}
	// The other end reports who it thinks has called.
	seen, err := to.next(s.ctx, to.served)
	if err != nil {
		return err
	}
	s.out.good("ok", "%-28s %s, %s", name, millis(r.Took), r.Path)
	s.out.detail("%s knows the caller as %s (%s, %s)", to.role, seen.Peer, strings.Join(seen.Tags, " "), seen.Addr)
	s.out.detail("and let it in by %s", seen.Rule)
	s.out.detail("asked %q, got %q", o.Say, r.Answer)
	s.want(seen.Peer == from.first.Peer && len(seen.Tags) == 1 && seen.Tags[0] == "tag:"+from.role, "%s: the identity of the caller", name)
	s.want(strings.HasPrefix(seen.Rule, rule+" (line "), "%s: admitted by %s", name, rule)
	s.want(strings.HasPrefix(r.Path, "direct") || strings.HasPrefix(r.Path, "relayed"), "%s: the path of the call", name)
	return nil
}

// refused makes a call that no rule names.
func (s *story) refused() error {
	s.out.title("A call that it does not")
	r, err := s.image.do(s.ctx, order{Do: doAsk, Addr: "database:5432", Say: "select secret from users"})
	if err != nil {
		return err
	}
	s.out.bad(r.Kind, "%-28s %s", "image → database:5432", millis(r.Took))
	s.out.detail("%s", r.Error)
	s.want(r.Kind == kindDenied, "image → database:5432 being refused by policy")
	return nil
}

// withoutControl kills the control plane and goes on calling.
func (s *story) withoutControl() error {
	s.out.title("The control plane dies (SIGKILL); what the agents know stays in force")
	// A connection from before,
	const held = "held"
	r, err := s.planner.do(s.ctx, order{Do: doOpen, Conn: held, Addr: "database:5432"})
	if err != nil {
		return err
	}
	if r.Error != "" {
		return fmt.Errorf("open a connection: %s", r.Error)
	}
	if _, err := s.database.next(s.ctx, s.database.served); err != nil {
		return err
	}
	s.kill(s.control)
	if _, err := s.admin.Status(s.ctx); err == nil {
		s.want(false, "the control plane being dead")
	}
	r, err = s.planner.do(s.ctx, order{Do: doSay, Conn: held, Say: "select 1"})
	if err != nil {
		return err
	}
	s.out.result(r.Error == "", "ok", "planner → database:5432, on a connection from before: %s%s", millis(r.Took), because(r.Error))
	s.want(r.Error == "", "a call on an old connection without the control plane")
	// and a new one.
	return s.call(s.planner, s.database, order{Do: doAsk, Addr: "database:5432", Say: "select count(*) from jobs"}, "acls[0]")
}

// revoked throws the image agent out while it has a connection open.
func (s *story) revoked() error {
	s.out.title("The control plane is back, and throws out the image agent in mid-connection")
	if err := s.startControl(); err != nil {
		return err
	}
	began := time.Now()
	if err := s.allBack(); err != nil {
		return err
	}
	s.out.line(processLine, "control", s.control.pid(), s.control.first.URL, "all agents are back after "+millis(time.Since(began)))

	const held = "metrics"
	r, err := s.image.do(s.ctx, order{Do: doOpen, Conn: held, Addr: "database:9187"})
	if err == nil && r.Error == "" {
		r, err = s.image.do(s.ctx, order{Do: doSay, Conn: held, Say: "requests_total"})
	}
	if err != nil {
		return err
	}
	s.out.result(r.Error == "", "ok", "image → database:9187, open and in use%s", because(r.Error))
	s.want(r.Error == "", "the image agent using its connection before it is thrown out")

	removed := time.Now()
	if err := s.admin.RemoveNode(s.ctx, "image"); err != nil {
		return err
	}
	s.out.line("  removed   image, with the call that `mesh node remove image` makes")
	// Whichever end hears of it first resets the connection. The other one reads
	// that, if the reset gets there before the control plane's word.
	told := 0
	for _, end := range []*process{s.image, s.database} {
		e, err := end.next(s.ctx, end.ended)
		if err != nil {
			return err
		}
		s.out.bad("cut", "the end at %s, %s after the removal", end.role, millis(e.at.Sub(removed)))
		s.out.detail("%s", e.Error)
		s.want(e.Kind == kindRevoked || e.Kind == kindReset, "the end at %s being cut: %s", end.role, e.Error)
		if e.Kind == kindRevoked {
			told++
		}
	}
	s.want(told > 0, "an end that is told that access was revoked")
	for _, try := range []struct {
		from  *process
		order order
	}{
		{s.image, order{Do: doAsk, Addr: "database:9187", Say: "requests_total"}},
		{s.planner, order{Do: doGet, Addr: "image:8080", Say: "/render?size=64"}},
	} {
		r, err := try.from.do(s.ctx, try.order)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s → %s", try.from.role, try.order.Addr)
		s.out.bad(r.Kind, "%-28s %s", name, millis(r.Took))
		s.out.detail("%s", r.Error)
		s.want(r.Error != "", "%s: no call to or from an agent that was thrown out", name)
	}
	return nil
}

// allBack waits until the control plane has heard of all agents and the relay.
func (s *story) allBack() error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := s.admin.Status(s.ctx)
		if err != nil {
			return err
		}
		relays, err := s.admin.Relays(s.ctx)
		if err != nil {
			return err
		}
		if st.Online == 3 && len(relays) == 1 && relays[0].Connected {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return fmt.Errorf("waiting for the agents to be back: %w", context.Cause(s.ctx))
		}
	}
}
