package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrExists says that something is there already, which is not overwritten.
var ErrExists = errors.New("exists already")

// Backup writes a copy of the store, as it is at one moment, to a file that does
// not exist yet: either the whole copy is there in the end, readable by nobody
// else, or nothing. Writers wait meanwhile. The copy is a store: to restore it,
// put it in the place of the file while no server runs.
func (s *SQLite) Backup(ctx context.Context, path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("back up to %q: %w", path, s.classify(err))
		}
	}()
	if !filepath.IsAbs(path) {
		return errors.New("want an absolute path")
	}
	if _, err := os.Lstat(path); err == nil {
		return ErrExists
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".mesh-backup-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	// SQLite takes an empty file for none.
	if _, err := s.db.ExecContext(ctx, `VACUUM INTO $1`, tmp.Name()); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	// Not a rename, which would overwrite what came meanwhile.
	if err := os.Link(tmp.Name(), path); err != nil {
		if errors.Is(err, os.ErrExist) {
			return ErrExists
		}
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a directory durable, where that is possible.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, os.ErrInvalid) && !errors.Is(err, os.ErrPermission) {
		return err
	}
	return nil
}
