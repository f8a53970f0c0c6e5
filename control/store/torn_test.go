package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// copyStore copies a store's files as a crash of the machine may leave them: the
// log cut off anywhere, or with a piece of garbage at its end.
func copyStore(t *testing.T, path, dir string, cut int64, garbage bool) string {
	t.Helper()
	to := filepath.Join(dir, "mesh.db")
	for _, suffix := range []string{"", "-wal"} {
		b := must[[]byte](t)(os.ReadFile(path + suffix))
		if suffix == "-wal" {
			b = b[:min(cut, int64(len(b)))]
			if n := len(b); garbage && n > 512 {
				for i := n - 512; i < n; i++ {
					b[i] = byte(rand.Uint32())
				}
			}
		}
		if err := os.WriteFile(to+suffix, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// Of a log that ends anywhere all that was complete in it is there, nothing is
// there by half, and the store goes on.
func TestTornLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := open(t, path)
	sizes := []int64{} // of the log after each write
	for i := range 40 {
		_, text := newKey(t, s, Key{})
		must[Node](t)(s.RegisterNode(ctx, text, testNode(i+1), start))
		fi := must[os.FileInfo](t)(os.Stat(path + "-wal"))
		sizes = append(sizes, fi.Size())
	}
	rounds := 20
	if os.Getenv("MESH_FULL") != "" {
		rounds = 200
	}
	whole := sizes[len(sizes)-1]
	for round := range rounds {
		cut := rand.Int64N(whole + 1)
		garbage := round%2 == 1
		c, err := OpenSQLite(ctx, copyStore(t, path, t.TempDir(), cut, garbage))
		if err != nil {
			t.Errorf("cut at %d: %v", cut, err)
			continue
		}
		atLeast := 0
		for _, size := range sizes {
			if size <= cut-512 || size <= cut && !garbage {
				atLeast++
			}
		}
		nodes := must[[]Node](t)(c.Nodes(ctx))
		used := 0
		for _, k := range must[[]Key](t)(c.Keys(ctx)) {
			if k.UsedBy != 0 {
				used++
			}
		}
		if len(nodes) < atLeast || used != len(nodes) {
			t.Errorf("cut at %d of %d: %d nodes and %d used keys, want at least %d", cut, whole, len(nodes), used, atLeast)
		}
		integrity(t, c)
		if _, err := verify(t, c, AuditHead{}); err != nil {
			t.Errorf("cut at %d: %v", cut, err)
		}
		must[User](t)(c.CreateUser(ctx, "test", fmt.Sprint("u", round), start))
		c.Close()
	}
}

// A file that lacks pages is refused: never half of it is served.
func TestTornFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := filled(t, path)
	s.Close() // into the file itself
	b := must[[]byte](t)(os.ReadFile(path))
	for range 20 {
		torn := filepath.Join(t.TempDir(), "mesh.db")
		if err := os.WriteFile(torn, b[:1+rand.IntN(len(b)-4096)], 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := OpenSQLite(ctx, torn)
		if err == nil {
			_, err = c.Nodes(ctx)
			_, err2 := c.Audit(ctx, start.AddDate(-1, 0, 0), 0, 1000)
			err = errors.Join(err, err2)
			c.Close()
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("a piece of the file: %v, want ErrCorrupt", err)
		}
	}
}
