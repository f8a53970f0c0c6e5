package pgserver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// dirVariable tells this program to start a server in a directory, and wait.
const dirVariable = "PGSERVER_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(dirVariable); dir != "" {
		bin, err := Find()
		if err == nil {
			_, err = Start(context.Background(), bin, dir)
		}
		if err != nil {
			os.Stdout.WriteString(err.Error())
			os.Exit(1)
		}
		os.Stdout.WriteString("!")
		select {}
	}
	os.Exit(m.Run())
}

// A program that is killed leaves no server behind.
func TestEndsWithParent(t *testing.T) {
	if _, err := Find(); err != nil {
		t.Skip(err)
	}
	parent, err := os.MkdirTemp("", "meshpg") // short enough for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(parent)
	dir := filepath.Join(parent, "pg")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), dirVariable+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said [200]byte
	n, err := out.Read(said[:])
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil || string(said[:n]) != "!" {
		t.Fatalf("%s: %v", said[:n], err)
	}
	// The server takes the file away when it ends.
	over := time.After(time.Minute)
	for {
		if _, err := os.Stat(filepath.Join(dir, "data", "postmaster.pid")); errors.Is(err, fs.ErrNotExist) {
			return
		}
		select {
		case <-over:
			t.Fatal("the server goes on")
		case <-time.After(10 * time.Millisecond):
		}
	}
}
