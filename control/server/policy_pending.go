package server

import "mesh/control/wire"

type parsedPolicy struct{}

func (*parsedPolicy) TagOwner(user, tag string) bool { return true }

func parsePolicy([]byte) (*parsedPolicy, error) { return &parsedPolicy{}, nil }

type everybody struct {
	ids  map[wire.NodeID]struct{}
	deny bool
}

func (e everybody) Filter(wire.NodeID) []wire.FilterRule {
	if e.deny {
		return nil
	}
	return []wire.FilterRule{{SrcIPs: []string{"*"}, DstPorts: []wire.NetPortRange{{IP: "*", Ports: wire.AllPorts}}}}
}
func (e everybody) Visible(id wire.NodeID) (out []wire.NodeID) {
	if e.deny {
		return nil
	}
	for o := range e.ids {
		if o != id {
			out = append(out, o)
		}
	}
	return out
}
func (e everybody) Upsert(n policyNode) []wire.NodeID {
	e.ids[n.ID] = struct{}{}
	return e.Visible(n.ID)
}
func (e everybody) Remove(id wire.NodeID) []wire.NodeID {
	out := e.Visible(id)
	delete(e.ids, id)
	return out
}

func compilePolicy(p *parsedPolicy, nodes []policyNode) compiledPolicy {
	e := everybody{map[wire.NodeID]struct{}{}, p == nil}
	for _, n := range nodes {
		e.ids[n.ID] = struct{}{}
	}
	return e
}
