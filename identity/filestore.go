package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
)

const (
	lockName    = "lock"
	maxBlobSize = 64 << 20 // a state file larger than this is not ours
)

// ErrStoreInUse reports that another process, or another node of this one,
// owns the state directory.
var ErrStoreInUse = errors.New("state directory is in use by another node")

// ErrStoreClosed reports the use of a FileStore after Close.
var ErrStoreClosed = errors.New("state directory is closed")

// FileStore is a Store in a directory: one file a blob, mode 0600, replaced
// atomically and synced to disk. It owns the directory until Close.
type FileStore struct {
	dir string

	mu   sync.Mutex // guards lock and serialises writes
	lock *os.File   // nil after Close
}

// OpenFileStore opens the state directory, making it if there is none. It
// fails with ErrStoreInUse while another FileStore, of this process or
// another, has it open.
func OpenFileStore(dir string) (*FileStore, error) {
	if dir == "" || strings.ContainsRune(dir, 0) {
		return nil, fmt.Errorf("state directory %q: not a path", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("state directory %s: not a directory", dir)
	}
	// On Windows the mode bits say nothing about access.
	if perm := fi.Mode().Perm(); runtime.GOOS != "windows" && perm&0o022 != 0 {
		return nil, fmt.Errorf("state directory %s: others may write to it (mode %04o): use one of your own, or chmod 700 it", dir, perm)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := lockFile(f); err != nil {
		holder := readHolder(f)
		f.Close()
		if errors.Is(err, errLocked) {
			return nil, fmt.Errorf("%w: %s%s; stop it, or give each node its own directory", ErrStoreInUse, dir, holder)
		}
		return nil, fmt.Errorf("lock state directory %s: %w", dir, err)
	}
	// The process number is only for the message above.
	if err := f.Truncate(0); err == nil {
		fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	return &FileStore{dir: dir, lock: f}, nil
}

func readHolder(f *os.File) string {
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if pid := strings.TrimSpace(string(b)); err == nil && pid != "" {
		return " (process " + pid + ")"
	}
	return ""
}

// Dir returns the directory.
func (s *FileStore) Dir() string { return s.dir }

// Read implements Store. It refuses a file that others can read or write,
// since what it holds may be known to them.
func (s *FileStore) Read(name string) ([]byte, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return nil, ErrStoreClosed
	}
	path := filepath.Join(s.dir, name)
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("state file %s: not a regular file", path)
	}
	if perm := fi.Mode().Perm(); runtime.GOOS != "windows" && perm&0o077 != 0 {
		return nil, fmt.Errorf("state file %s: others may read it (mode %04o), so its keys may be known: delete it to enrol anew, or chmod 600 it if you are sure", path, perm)
	}
	if fi.Size() > maxBlobSize {
		return nil, fmt.Errorf("state file %s: %d bytes is too large", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	return b, nil
}

// Write implements Store.
func (s *FileStore) Write(name string, data []byte) error {
	if err := checkName(name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return ErrStoreClosed
	}
	if err := replaceFile(filepath.Join(s.dir, name), data); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// replaceFile writes a temporary file beside path, syncs it and renames it
// over path, so that at any moment there is a whole old or a whole new file.
func replaceFile(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if _, err = tmp.Write(data); err != nil {
		return err
	}
	if err = tmp.Sync(); err != nil {
		return err
	}
	if err = tmp.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// syncDir makes a rename durable.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // directories cannot be opened for syncing there
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, fs.ErrInvalid) {
		return err
	}
	return nil
}

// Close gives the directory up. Further calls do nothing.
func (s *FileStore) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close() // the lock goes with the file
	s.lock = nil
	return err
}
