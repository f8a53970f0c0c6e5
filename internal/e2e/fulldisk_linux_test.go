package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mesh"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// mount makes a small file system of memory for the test.
func mount(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("no file system can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// A full disk is an error that says so, and a running node survives it.
func TestFullDisk(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	dir := mount(t, "size=64k,mode=700")
	fill := func() {
		f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	fill()
	state := filepath.Join(dir, "n")
	n := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = state })
	if _, err := n.Up(t.Context()); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "no space left") {
		t.Fatalf("start on a full disk: %v", err)
	}
	os.Remove(filepath.Join(dir, "ballast"))
	meshtest.Up(t, n)
	fill()
	other := m.Node("other", []string{"tag:a"})
	meshtest.Up(t, other)
	know(t, n, other)
	c1, c2 := connect(t, other, n)
	if err := exchange(c1, c2, 1<<20); err != nil {
		t.Error(err)
	}
	c1.Close()
	c2.Close()
	// What is on the disk is whole: the node starts with it, also while
	// nothing can be written.
	n.Close()
	again := m.Node("n", nil, func(n *mesh.Node) { n.Dir = state })
	meshtest.Up(t, again)
	if h, err := host.Start(host.Config{DataDir: filepath.Join(dir, "control"), Listen: "127.0.0.1:0", STUN: "off"}); err == nil {
		h.Close()
		t.Error("a server started on a full disk")
	} else if !strings.Contains(err.Error(), "full") && !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("server on a full disk: %v", err)
	}
}

// A read-only file system, which binds root too.
func TestReadOnlyFileSystem_G80(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	dir := mount(t, "size=64k,mode=700")
	state := filepath.Join(dir, "n")
	n := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = state })
	meshtest.Up(t, n)
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err == nil {
		t.Fatal("remounted although a file is open for writing")
	}
	n.Close()
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Join(dir, "new"), state} {
		again := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = dir })
		if _, err := again.Up(t.Context()); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), dir) {
			t.Errorf("start in %s: %v", dir, err)
		}
	}
}
