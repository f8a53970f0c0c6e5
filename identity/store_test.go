package identity

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStores(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a b#c?d%20e") // characters that are special elsewhere
	file, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, s := range map[string]Store{"file": file, "memory": &MemoryStore{}} {
		t.Run(name, func(t *testing.T) {
			if _, err := s.Read("state"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("read of nothing: %v", err)
			}
			data := []byte("one")
			if err := s.Write("state", data); err != nil {
				t.Fatal(err)
			}
			data[0] = 'X'
			if b, err := s.Read("state"); err != nil || string(b) != "one" {
				t.Errorf("read back %q, %v", b, err)
			}
			if err := s.Write("state", []byte("two")); err != nil {
				t.Fatal(err)
			}
			if b, _ := s.Read("state"); string(b) != "two" {
				t.Errorf("read back %q", b)
			}
			for _, bad := range []string{"", ".", "..", "../x", "a/b", "A", "lock", "x\n", strings.Repeat("x", 65), `a\b`, "a\x00"} {
				if err := s.Write(bad, nil); err == nil {
					t.Errorf("name %q accepted", bad)
				}
			}
		})
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fi, _ := e.Info()
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), fi.Mode())
		}
	}
	if len(entries) != 2 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestFileStoreHasOneOwner(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = OpenFileStore(dir)
	if !errors.Is(err, ErrStoreInUse) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "process") {
		t.Errorf("second owner: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := s.Write("state", nil); !errors.Is(err, ErrStoreClosed) {
		t.Errorf("write after Close: %v", err)
	}
	s, err = OpenFileStore(dir)
	if err != nil {
		t.Fatalf("reopen: %v", err)
	}
	s.Close()
}

func TestFileStoreRefusesUnsafeFiles(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.WriteFile(filepath.Join(dir, "open"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read("open"); err == nil || !strings.Contains(err.Error(), "others may read it") {
		t.Errorf("readable by others: %v", err)
	}
	if err := os.Symlink(filepath.Join(dir, "open"), filepath.Join(dir, "link")); err != nil {
		t.Skip(err)
	}
	if _, err := s.Read("link"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("symlink: %v", err)
	}
	if err := s.Write("link", []byte("new")); err != nil {
		t.Errorf("write over symlink: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "open")); string(b) != "x" {
		t.Error("write followed the symlink")
	}
	shared := filepath.Join(t.TempDir(), "shared")
	os.Mkdir(shared, 0o777)
	os.Chmod(shared, 0o777)
	if _, err := OpenFileStore(shared); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("world-writable directory: %v", err)
	}
	if _, err := OpenFileStore(filepath.Join(dir, "open")); err == nil {
		t.Error("a file was taken for a directory")
	}
}

// A write that fails leaves the old blob and no litter.
func TestFileStoreKeepsOldOnFailure(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// A directory in the way makes the rename fail, also for root, whom
	// read-only permissions do not stop.
	if err := os.MkdirAll(filepath.Join(dir, "state", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Write("state", bytes.Repeat([]byte("x"), 100)); err == nil {
		t.Error("write over a directory succeeded")
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 2 {
		t.Errorf("left behind: %v", entries)
	}
}
