package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
)

const (
	stateName    = "state.json"
	stateVersion = 1
)

// ErrBadState reports that a node's saved state cannot be read. It is left as
// it is, since its keys may still be saved by hand.
var ErrBadState = errors.New("saved state is damaged")

// State is what a node keeps between runs to stay the same node.
type State struct {
	Machine MachinePrivate
	Node    NodePrivate
	// Enrolled says that a control server accepted Node.
	Enrolled bool
	// Next is the key that is to replace Node, saved before the control server
	// hears of it: whichever of the two is accepted after a crash is the node's.
	// Zero = none.
	Next NodePrivate
	// Cloned says that another copy of this state was found to be the newer one.
	Cloned bool
}

type stateFile struct {
	Version    int    `json:"version"`
	MachineKey string `json:"machineKey"`
	NodeKey    string `json:"nodeKey"`
	Enrolled   bool   `json:"enrolled"`
	NextKey    string `json:"nextKey,omitempty"`
	Cloned     bool   `json:"cloned,omitempty"`
}

// LoadState reads the state from s, or makes new keys and saves them if there
// is none. The error matches ErrBadState if what is there cannot be read.
func LoadState(s Store) (State, error) {
	b, err := s.Read(stateName)
	if errors.Is(err, fs.ErrNotExist) {
		st := State{Machine: NewMachine(), Node: NewNode()}
		return st, st.Save(s)
	}
	if err != nil {
		return State{}, err
	}
	var f stateFile
	var st State
	if err = json.Unmarshal(b, &f); err == nil && f.Version != stateVersion {
		err = fmt.Errorf("version %d, this program knows version %d", f.Version, stateVersion)
	}
	if err == nil {
		st.Machine, err = ParseMachinePrivate(f.MachineKey)
	}
	if err == nil {
		st.Node, err = ParseNodePrivate(f.NodeKey)
	}
	if err == nil && f.NextKey != "" {
		st.Next, err = ParseNodePrivate(f.NextKey)
	}
	if err == nil && (st.Machine.IsZero() || st.Node.IsZero()) {
		err = errors.New("a key is missing")
	}
	if err != nil {
		return State{}, fmt.Errorf("%w: %s: %w; restore it from a backup, or delete it to enrol this node anew", ErrBadState, stateName, err)
	}
	st.Enrolled, st.Cloned = f.Enrolled, f.Cloned
	return st, nil
}

// Save writes the state to s.
func (st State) Save(s Store) error {
	f := stateFile{Version: stateVersion, MachineKey: st.Machine.Secret(), NodeKey: st.Node.Secret(), Enrolled: st.Enrolled, Cloned: st.Cloned}
	if !st.Next.IsZero() {
		f.NextKey = st.Next.Secret()
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return s.Write(stateName, b)
}
