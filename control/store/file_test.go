package store

import (
	"bufio"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"mesh/identity"
	"mesh/internal/pgserver/pgtest"
)

func TestOddPaths(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("names that Windows does not know")
	}
	dir := t.TempDir()
	for _, name := range []string{"a#b.db", "a?b.db", "a%23b.db", "a%b.db", "a b.db", "a\nb.db", "a?mode=memory", "a'\";.db", "file:a.db", "ü.db", "?x", "d#?%/mesh.db"} {
		path := filepath.Join(dir, name)
		s, err := OpenSQLite(ctx, path)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if _, err := s.CreateUser(ctx, "test", "alice", start); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		for _, file := range []string{path, path + "-wal", path + ".lock"} {
			if fi, err := os.Lstat(file); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%q: %v, %v; want mode 0600", file, fi, err)
			}
		}
		s.Close()
		s = open(t, path)
		if u := must[[]User](t)(s.Users(ctx)); len(u) != 1 {
			t.Errorf("%q: the file was not the one opened first", name)
		}
		s.Close()
	}
	if fi, err := os.Stat(filepath.Join(dir, "d#?%")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v %v, want mode 0700", fi, err)
	}
	entries := must[[]os.DirEntry](t)(os.ReadDir(dir))
	for _, e := range entries {
		if e.Name() == "a" || e.Name() == "a#b" || e.Name() == "mesh.db" {
			t.Errorf("another file was opened: %q", e.Name())
		}
	}
	if _, err := OpenSQLite(ctx, ""); err == nil {
		t.Error("empty path was accepted")
	}
	if _, err := OpenSQLite(ctx, "a\x00b"); err == nil {
		t.Error("path with NUL was accepted")
	}
}

func TestSecondOpenIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := open(t, path)
	_, err := OpenSQLite(ctx, path)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "another server") {
		t.Errorf("second open: %v, want ErrLocked", err)
	}
	s.Close()
	s.Close()
	open(t, path)
}

func TestUnusableFiles(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	os.WriteFile(garbage, []byte(strings.Repeat("not a database ", 1000)), 0o600)
	if _, err := OpenSQLite(ctx, garbage); !errors.Is(err, ErrCorrupt) {
		t.Errorf("garbage: %v, want ErrCorrupt", err)
	}

	foreign := filepath.Join(dir, "foreign.db")
	db := must[*sql.DB](t)(sql.Open("sqlite", foreign))
	if _, err := db.Exec(`CREATE TABLE x (y)`); err != nil {
		t.Fatal(err)
	}
	db.Close()
	if _, err := OpenSQLite(ctx, foreign); !errors.Is(err, ErrCorrupt) {
		t.Errorf("database of something else: %v, want ErrCorrupt", err)
	}

	newer := filepath.Join(dir, "newer.db")
	s := open(t, newer)
	if _, err := s.db.Exec(`PRAGMA user_version = 1000`); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := OpenSQLite(ctx, newer); !errors.Is(err, ErrNewer) {
		t.Errorf("newer: %v, want ErrNewer", err)
	}

	keyless := filepath.Join(dir, "keyless.db")
	s = open(t, keyless)
	if _, err := s.db.Exec(`DELETE FROM meta`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ServerKey(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("lost server key: %v, want ErrNotFound, never a new key", err)
	}

	if runtime.GOOS != "windows" {
		link := filepath.Join(dir, "link.db")
		if err := os.Symlink(newer, link); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenSQLite(ctx, link); err == nil || !strings.Contains(err.Error(), "not a plain file") {
			t.Errorf("symbolic link: %v", err)
		}
		shared := filepath.Join(dir, "shared")
		os.Mkdir(shared, 0o700)
		os.Chmod(shared, 0o777)
		if _, err := OpenSQLite(ctx, filepath.Join(shared, "mesh.db")); err == nil || !strings.Contains(err.Error(), "everybody") {
			t.Errorf("directory open to everybody: %v", err)
		}
	}
}

func TestFullDiskAndReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := open(t, path)
	must[User](t)(s.CreateUser(ctx, "test", "alice", start))
	_, text := newKey(t, s, Key{})

	// As small as the file is now: every growth is "disk full" to SQLite.
	var pages int
	if err := s.db.QueryRow(`PRAGMA page_count`).Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.Exec(fmt.Sprintf(`PRAGMA max_page_count = %d`, pages)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetPolicy(ctx, "test", strings.Repeat("x", 1<<20), "", -1, start); !errors.Is(err, ErrFull) {
		t.Errorf("full: %v, want ErrFull", err)
	}
	if _, err := s.Policy(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("half a policy was kept: %v", err)
	}
	if _, err := s.db.Exec(`PRAGMA max_page_count = 1000000`); err != nil {
		t.Fatal(err)
	}

	if _, err := s.db.Exec(`PRAGMA query_only = 1`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RegisterNode(ctx, text, testNode(1), start); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v, want ErrReadOnly", err)
	}
	if u := must[[]User](t)(s.Users(ctx)); len(u) != 1 {
		t.Errorf("%d users, want 1", len(u))
	}
	if _, err := s.db.Exec(`PRAGMA query_only = 0`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RegisterNode(ctx, text, testNode(1), start); err != nil {
		t.Errorf("after space came back: %v", err)
	}
}

// childEnv makes the test binary run as the victim of TestKill.
const childEnv = "MESH_STORE_TEST_CHILD"

// openPlace opens a file, or a database by its URL.
func openPlace(place string) (Store, error) {
	if strings.HasPrefix(place, "postgres://") {
		return OpenPostgres(ctx, place)
	}
	return OpenSQLite(ctx, place)
}

// child writes without end and says on stdout what was acknowledged.
func child(place string) {
	s, err := openPlace(place)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	base := must2(s.LastNodeID(ctx))
	for i := int(base) + 1; ; i++ {
		_, text, err := s.CreateKey(ctx, "child", Key{Kind: KeyNode, Created: start})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("key", text)
		n := testNode(i)
		n, err = s.RegisterNode(ctx, text, n, start)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("node", n.Key, text)
	}
}

func must2[T any](v T, err error) T {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	return v
}

func TestKillLosesNothingAcknowledged(t *testing.T) {
	t.Run("SQLite", func(t *testing.T) { testKill(t, filepath.Join(t.TempDir(), "mesh.db")) })
	t.Run("PostgreSQL", func(t *testing.T) { testKill(t, pgtest.Database(t)) })
}

// killRounds is how often the writer is killed.
func killRounds() int {
	switch {
	case os.Getenv("MESH_FULL") != "":
		return 200
	case testing.Short():
		return 3
	}
	return 10
}

func testKill(t *testing.T, place string) {
	exe := must[string](t)(os.Executable())
	keys := map[string]bool{}  // acknowledged and not known to be used
	nodes := map[string]bool{} // acknowledged node keys
	total := 0
	rounds := killRounds()
	for round := range rounds {
		cmd := exec.Command(exe, "-test.run=^$")
		cmd.Env = append(os.Environ(), childEnv+"="+place)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Kill after a random number of acknowledgements, and a random moment
		// after that, in the middle of whatever it does then.
		after := rand.IntN(30)
		seen := 0
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			switch f[0] {
			case "key":
				keys[f[1]] = true
			case "node":
				nodes[f[1]] = true
				delete(keys, f[2])
			default:
				t.Errorf("child: %s", lines.Text())
			}
			if seen++; seen == after+1 {
				kill := time.AfterFunc(time.Duration(rand.IntN(3000))*time.Microsecond, func() { cmd.Process.Kill() })
				defer kill.Stop()
			}
		}
		cmd.Wait()
		total += seen

		s, err := openPlace(place)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		have := map[string]bool{}
		for _, n := range must[[]Node](t)(s.Nodes(ctx)) {
			have[n.Key.String()] = true
		}
		for k := range nodes {
			if !have[k] {
				t.Errorf("round %d: acknowledged node is gone", round)
			}
		}
		used := 0
		for k := range keys {
			// At most the last key of each round may be used by a node whose
			// acknowledgement did not reach us; never less than acknowledged.
			key, err := s.VerifyKey(ctx, KeyNode, k, start)
			if err != nil {
				used++
				delete(keys, k)
				if key.UsedBy == 0 {
					t.Errorf("round %d: key: %v", round, err)
				}
			}
		}
		if used > 1 {
			t.Errorf("round %d: %d unacknowledged registrations, want at most 1", round, used)
		}
		if len(have) < len(nodes) || len(have) > len(nodes)+round+1 {
			t.Errorf("round %d: %d nodes for %d acknowledged", round, len(have), len(nodes))
		}
		if _, err := verify(t, s, AuditHead{}); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if s, ok := s.(*SQLite); ok {
			integrity(t, s)
		}
		s.Close()
	}
	t.Logf("%d acknowledged writes over %d kills", total, rounds)
}

func integrity(t *testing.T, s *SQLite) {
	t.Helper()
	var check string
	if err := s.db.QueryRow(`PRAGMA integrity_check`).Scan(&check); err != nil || check != "ok" {
		t.Errorf("integrity: %s %v", check, err)
	}
}

func FuzzKeyText(f *testing.F) {
	f.Add("mesh-auth-1-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("mesh-auth-01-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Add("mesh-auth-1-")
	f.Add("mesh-relay-1-x")
	f.Add(identity.NewNode().Public().String())
	f.Fuzz(func(t *testing.T, text string) {
		id, _, ok := parseKeyText(KeyNode, text)
		if ok && !strings.HasPrefix(text, fmt.Sprintf("mesh-auth-%d-", id)) {
			t.Errorf("%q parsed as key %d", text, id)
		}
	})
}
