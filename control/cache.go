package control

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

// mapName is the name of the saved map in a store.
const mapName = "netmap"

// cacheMagic starts a saved map; it names the version of the form. A code of
// authentication follows, then JSON.
const cacheMagic = "mesh netmap 1\n"

// ErrBadCache reports a saved map that is damaged, or was not saved by this
// installation for this control server and node. It is of no use.
var ErrBadCache = errors.New("saved netmap is not to be trusted")

// savedMap is what is saved.
type savedMap struct {
	URL   string    // of the control server
	Saved time.Time // when the control server was last heard
	Map   *wire.MapResponse
}

// SaveMap saves a map, so that the node can start again while the control
// server is away. Nobody without the machine key can change what is saved
// unnoticed.
func (c *Client) SaveMap(store identity.Store, m *netmap.Map) error {
	out, err := c.encodeMap(m)
	if err == nil {
		err = store.Write(mapName, out)
	}
	if err != nil {
		return fmt.Errorf("save netmap: %w", err)
	}
	return nil
}

// savedNode is about how many bytes a node takes in a saved map.
const savedNode = 768

// encodeMap returns what is saved of m. The text of a large map is many
// megabytes: it is made node by node, in its place.
func (c *Client) encodeMap(m *netmap.Map) ([]byte, error) {
	r := m.Response()
	peers := r.Peers
	r.Peers = nil
	at := c.LastHeard()
	if at.IsZero() {
		at = time.Now()
	}
	head, err := json.Marshal(savedMap{URL: c.base, Saved: at.UTC(), Map: r})
	if err != nil {
		return nil, err
	}
	const end = "}}" // of the map, which has a node and is the last member, and of what it is in
	var b bytes.Buffer
	b.Grow(len(cacheMagic) + sha256.Size + len(head) + savedNode*(len(peers)+1))
	b.WriteString(cacheMagic)
	b.Write(make([]byte, sha256.Size))
	b.Write(bytes.TrimSuffix(head, []byte(end)))
	each := json.NewEncoder(&b)
	for i, n := range peers {
		if i == 0 {
			b.WriteString(`,"Peers":[`)
		} else {
			b.WriteByte(',')
		}
		if err := each.Encode(n); err != nil {
			return nil, err
		}
	}
	if len(peers) > 0 {
		b.WriteByte(']')
	}
	b.WriteString(end)
	out := b.Bytes()
	mac := len(cacheMagic)
	copy(out[mac:], c.authenticate(out[mac+sha256.Size:]))
	return out, nil
}

// SavedMap returns the map that SaveMap saved for the node with that key, and
// when the control server had last been heard by then. The error is fs.ErrNotExist when there is none, and ErrBadCache when
// what is there is of no use.
func (c *Client) SavedMap(store identity.Store, key identity.NodePublic) (*netmap.Map, time.Time, error) {
	var never time.Time
	b, err := store.Read(mapName)
	if err != nil {
		return nil, never, fmt.Errorf("load saved netmap: %w", err)
	}
	if len(b) == 0 {
		return nil, never, fmt.Errorf("load saved netmap: it was forgotten: %w", fs.ErrNotExist)
	}
	rest, ok := bytes.CutPrefix(b, []byte(cacheMagic))
	if !ok || len(rest) < sha256.Size {
		return nil, never, fmt.Errorf("%w: it has another form", ErrBadCache)
	}
	mac, body := rest[:sha256.Size], rest[sha256.Size:]
	if !hmac.Equal(mac, c.authenticate(body)) {
		return nil, never, fmt.Errorf("%w: it was changed, or saved by another installation", ErrBadCache)
	}
	var saved savedMap
	if err := json.Unmarshal(body, &saved); err != nil || saved.Map == nil {
		return nil, never, fmt.Errorf("%w: it makes no sense: %v", ErrBadCache, err)
	}
	if saved.URL != c.base {
		return nil, never, fmt.Errorf("%w: it is from control server %s", ErrBadCache, saved.URL)
	}
	m, _, err := netmap.Apply(nil, saved.Map)
	if err != nil {
		return nil, never, fmt.Errorf("%w: %v", ErrBadCache, err)
	}
	if m == nil || m.Self().Key != key {
		return nil, never, fmt.Errorf("%w: it is for another node key", ErrBadCache)
	}
	return m, saved.Saved, nil
}

// ForgetMap removes the saved map.
func ForgetMap(store identity.Store) error {
	if err := store.Write(mapName, nil); err != nil {
		return fmt.Errorf("forget saved netmap: %w", err)
	}
	return nil
}

// authenticate returns the code of a saved map.
func (c *Client) authenticate(body []byte) []byte {
	secret := c.cfg.Machine.Bytes()
	key, err := hkdf.Key(sha256.New, secret[:], nil, "mesh netmap cache", sha256.Size)
	if err != nil {
		panic("control: " + err.Error()) // length is always right
	}
	h := hmac.New(sha256.New, key)
	h.Write([]byte(cacheMagic))
	h.Write(body)
	return h.Sum(nil)
}
