package server

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.uber.org/zap"

	"mesh/control/wire"
)

// Of two processes that are alive with one identity the one that came later is
// the node, and the other is told that it is a copy. Each process names itself.
// What is kept of a node are these names, the present one first: whoever is
// among the others has had its time. One that is not known is new, also where
// the server has forgotten something.

// keptInstances is how many names of processes are kept of a node.
const keptInstances = 8

func instances(n *node) []string {
	if n.Instance == "" {
		return nil
	}
	return strings.Split(n.Instance, ",")
}

// cleanInstance returns a process's name for itself, "" for none.
func cleanInstance(s string) string {
	odd := func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') }
	if len(s) > wire.MaxInstance || strings.ContainsFunc(s, odd) {
		return ""
	}
	return s
}

// superseded reports whether another process became the node after the one of
// that name. Server.mu is held.
func superseded(n *node, instance string) bool {
	return slices.Index(instances(n), cleanInstance(instance)) > 0
}

// claim makes a process the node, or refuses it: another one is newer, or there
// while this one would rather not take its place. replaced says that another
// was there. Server.mu is held.
func (s *Server) claim(n *node, instance string, yield bool) (replaced bool, err error) {
	instance = cleanInstance(instance)
	if instance == "" {
		return false, nil // it does not say, as stock nodes
	}
	known := instances(n)
	switch slices.Index(known, instance) {
	case 0:
		return false, nil
	case -1:
	default:
		return false, wire.ErrCloned
	}
	there := len(known) > 0 && n.online == presenceOnline
	if there && yield {
		return false, wire.ErrCloned
	}
	if len(known) > 0 && n.stream != nil {
		n.stream.end(wire.CodeCloned)
		replaced = true
	}
	n.Instance = strings.Join(append([]string{instance}, known[:min(len(known), keptInstances-1)]...), ",")
	s.unsaved[n.ID] = struct{}{}
	return replaced, nil
}

// admitProcess is claim for a request to register. The answer is for a node that
// is welcome. Server.mu is held.
func (s *Server) admitProcess(n *node, c *client, req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	replaced, err := s.claim(n, req.MeshInstance, req.MeshYield)
	if err != nil {
		return nil, err
	}
	return s.welcomeProcess(n, c, replaced), nil
}

// welcomeProcess is welcome after claim. Server.mu is held.
func (s *Server) welcomeProcess(n *node, c *client, replaced bool) *wire.RegisterResponse {
	resp := s.welcome(&n.Node)
	if resp.MeshReplaced = replaced; replaced {
		s.noteCopy(n, c.source)
	}
	return resp
}

// noteCopy records that a process took the place of another that was there.
// Server.mu is held.
func (s *Server) noteCopy(n *node, from netip.Addr) {
	if n.swap(s.cfg.Now()) { // not for ever by two that chase each other
		s.suspect("node.replaced", n, fmt.Sprintf("a process at %s took the place of one that was there: a copy of its keys, or a restart before the end of the other was noticed", source(from)))
	}
}

// suspect records that keys seem to be in more than one place. Server.mu is
// held.
func (s *Server) suspect(action string, n *node, detail string) {
	s.log.Warn("keys are in more than one place", zap.String("node", n.Name), zap.String("what", detail))
	now, name := s.cfg.Now(), n.Name
	s.wg.Go(func() {
		if err := s.store.Note(context.WithoutCancel(s.ctx), "server", action, name, detail, now); err != nil {
			s.log.Error("could not be recorded", zap.String("what", action), zap.Error(err))
		}
	})
}

// noteReuse records that a machine key enrols another node while the machine's
// last one is there: it was copied, or the machine has two nodes. Server.mu is
// held.
func (s *Server) noteReuse(n *node, from netip.Addr) {
	for _, o := range s.nodes.byMachine[n.Machine] {
		if o != n && o.stream != nil {
			s.suspect("node.machine-reuse", n, fmt.Sprintf("the machine key of %s, which is there, enrolled it from %s", o.Name, source(from)))
			return
		}
	}
}
