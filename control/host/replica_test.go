package host

import (
	"os"
	"path/filepath"
	"testing"

	"mesh/internal/pgserver/pgtest"
)

// A data directory that was copied makes a replica of its own.
func TestCopiedDataDirectory(t *testing.T) {
	database := pgtest.Database(t)
	start := func(dir string) *Host {
		t.Helper()
		h, err := Start(Config{DataDir: dir, Database: database, Listen: "127.0.0.1:0", STUN: "off"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		return h
	}
	name := func(dir string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, keysDir, replicaFile))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	a, b := t.TempDir(), t.TempDir()
	first := start(a)
	if err := os.Mkdir(filepath.Join(b, keysDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b, keysDir, replicaFile), []byte(name(a)), 0o600); err != nil {
		t.Fatal(err)
	}
	copied := name(b)
	second := start(b)
	if copied != name(a) || name(b) == copied {
		t.Errorf("the copy has %s, and then %s; the original %s", copied, name(b), name(a))
	}
	if first.region == second.region {
		t.Errorf("both relays have region %d", first.region)
	}
	// Started again, it goes on as what it became.
	second.Close()
	now, region := name(b), second.region
	if third := start(b); name(b) != now || third.region != region {
		t.Errorf("%s in region %d, and then %s in %d", now, region, name(b), third.region)
	}
}
