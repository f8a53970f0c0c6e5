package disco

import (
	"container/list"
	"sync"

	"mesh/identity"
)

// Sealer seals and opens packets between one node and its peers. It remembers
// the shared secrets of the peers used last, since computing one costs more
// than all the rest. It is safe for concurrent use.
type Sealer struct {
	own identity.DiscoPrivate
	pub [identity.KeyLen]byte
	max int

	mu    sync.Mutex // guards byKey and order
	byKey map[identity.DiscoPublic]*list.Element
	order *list.List // of *shared, the one used last in front
}

type shared struct {
	key identity.DiscoPublic
	box *identity.Shared
}

// NewSealer returns a Sealer for the node with the given key that remembers at
// most max secrets. It panics for the zero key.
func NewSealer(own identity.DiscoPrivate, max int) *Sealer {
	return &Sealer{
		own:   own,
		pub:   own.Public().Bytes(),
		max:   max,
		byKey: make(map[identity.DiscoPublic]*list.Element),
		order: list.New(),
	}
}

// Public returns the node's own key.
func (s *Sealer) Public() identity.DiscoPublic { return identity.DiscoPublicFrom(s.pub) }

// Seal appends the packet that carries m to the peer. The peer's key must not
// be zero.
func (s *Sealer) Seal(dst []byte, peer identity.DiscoPublic, m Message) []byte {
	var room [256]byte
	dst = append(dst, Magic...)
	dst = append(dst, s.pub[:]...)
	return s.shared(peer).Seal(dst, Append(room[:0], m))
}

// Open returns sender and message of a packet. Call it only when the sender
// that Sender names is a known peer: otherwise strangers fill the memory of
// secrets and cost a key agreement each.
func (s *Sealer) Open(packet []byte) (identity.DiscoPublic, Message, error) {
	from, ok := Sender(packet)
	if !ok || len(packet) < Overhead {
		return from, nil, ErrNotForUs
	}
	plain, ok := s.shared(from).Open(nil, packet[clearLen:])
	if !ok {
		return from, nil, ErrNotForUs
	}
	m, err := Parse(plain)
	return from, m, err
}

// Forget drops the secret shared with a peer whose key is no longer in use.
func (s *Sealer) Forget(peer identity.DiscoPublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.byKey[peer]; ok {
		s.order.Remove(e)
		delete(s.byKey, peer)
	}
}

func (s *Sealer) shared(peer identity.DiscoPublic) *identity.Shared {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.byKey[peer]; ok {
		s.order.MoveToFront(e)
		return e.Value.(*shared).box
	}
	sh := &shared{key: peer, box: s.own.Shared(peer)}
	s.byKey[peer] = s.order.PushFront(sh)
	if s.order.Len() > s.max {
		oldest := s.order.Back()
		s.order.Remove(oldest)
		delete(s.byKey, oldest.Value.(*shared).key)
	}
	return sh.box
}
