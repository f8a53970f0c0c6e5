package identity

import (
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
)

// Store keeps a node's state between runs: named blobs, all of them secret.
// It is used by one node at a time. Implementations may be a directory
// (FileStore), memory (MemoryStore), or the user's own over a secret manager.
type Store interface {
	// Read returns the blob of that name; errors.Is(err, fs.ErrNotExist)
	// when there is none.
	Read(name string) ([]byte, error)
	// Write replaces the blob of that name. When it returns nil the blob is
	// durable; when it fails the old one is still there.
	Write(name string, data []byte) error
}

// MemoryStore is a Store that forgets when the process ends. The zero value is
// empty and ready to use; it is safe for concurrent use.
type MemoryStore struct {
	mu    sync.Mutex // guards blobs
	blobs map[string][]byte
}

// Read implements Store.
func (m *MemoryStore) Read(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[name]
	if !ok {
		return nil, fmt.Errorf("state %q in memory: %w", name, fs.ErrNotExist)
	}
	return slices.Clone(b), nil
}

// Write implements Store.
func (m *MemoryStore) Write(name string, data []byte) error {
	if err := checkName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next := maps.Clone(m.blobs)
	if next == nil {
		next = map[string][]byte{}
	}
	next[name] = slices.Clone(data)
	m.blobs = next
	return nil
}

// checkName keeps names of blobs to what is a plain file name on every system.
func checkName(name string) error {
	ok := name != "" && len(name) <= 64 && name[0] != '.'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_')
	}
	if !ok || name == lockName {
		return fmt.Errorf("state name %q: want lower-case letters, digits, '.', '-' and '_'", name)
	}
	return nil
}
