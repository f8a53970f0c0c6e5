package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// SQLite is a Store in one file. It has the file for itself: a second process
// that opens it gets ErrLocked.
type SQLite struct {
	database
	path string
	lock io.Closer

	closeOnce sync.Once
	closeErr  error
}

var _ Store = (*SQLite)(nil)

// OpenSQLite opens the store in the file at path and creates file and
// directory if they do not exist, for nobody else to read. Any path works,
// whatever characters it holds. Errors: ErrLocked, ErrReadOnly, ErrFull,
// ErrCorrupt, ErrNewer.
func OpenSQLite(ctx context.Context, path string) (_ *SQLite, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store %q: %w", path, classifySQLite(err))
		}
	}()
	if path == "" || strings.ContainsRune(path, 0) {
		return nil, errors.New("not a file name")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := prepareFile(abs); err != nil {
		return nil, err
	}
	lock, err := Lock(abs + ".lock")
	if err != nil {
		return nil, err
	}
	s := &SQLite{path: abs, lock: lock}
	s.dialect = dialect{
		lastNode: `SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'nodes'), 0)`,
		classify: classifySQLite,
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.db, err = sql.Open("sqlite", dataSource(abs)); err != nil {
		return nil, err
	}
	// One connection: SQLite has one writer anyway, and reads are rare, since
	// the server answers from memory.
	s.db.SetMaxOpenConns(1)
	s.db.SetConnMaxIdleTime(0)
	s.db.SetConnMaxLifetime(0)
	if err := s.migrate(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// dataSource names the file as a URI in which no character of the path can be
// taken for a parameter, and sets every connection up.
func dataSource(abs string) string {
	p := filepath.ToSlash(abs)
	if runtime.GOOS == "windows" && !strings.HasPrefix(p, "/") {
		p = "/" + p // file:///C:/…
	}
	parts := strings.Split(p, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	q := url.Values{
		"_txlock": {"immediate"},
		"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)"},
	}
	return "file://" + strings.Join(parts, "/") + "?" + q.Encode()
}

// prepareFile sees to it that the file exists, is a plain one, and is private,
// before SQLite opens it: its companions take over the mode.
func prepareFile(abs string) error {
	dir := filepath.Dir(abs)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if fi, err := os.Stat(dir); err != nil {
		return err
	} else if runtime.GOOS != "windows" && fi.Mode()&0o002 != 0 && fi.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("directory %q can be written by everybody: chmod o-w it", dir)
	}
	switch fi, err := os.Lstat(abs); {
	case err == nil && !fi.Mode().IsRegular():
		return errors.New("not a plain file")
	case err == nil && runtime.GOOS != "windows" && fi.Mode().Perm()&0o077 != 0:
		return os.Chmod(abs, 0o600)
	case err == nil:
		return nil
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	f, err := os.OpenFile(abs, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Close closes the file. It may be called more than once.
func (s *SQLite) Close() error {
	s.closeOnce.Do(func() {
		if s.db != nil {
			s.closeErr = s.db.Close()
		}
		s.lock.Close() // and with it goes the lock
	})
	return s.closeErr
}

// classifySQLite adds the error of this package that an error of SQLite or of
// the file system stands for.
func classifySQLite(err error) error {
	var se *sqlite.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &se):
		switch se.Code() & 0xff {
		case sqlite3.SQLITE_CONSTRAINT:
			return fmt.Errorf("%w: %w", ErrConflict, err)
		case sqlite3.SQLITE_FULL:
			return fmt.Errorf("%w: %w", ErrFull, err)
		case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
			return fmt.Errorf("%w: %w", ErrReadOnly, err)
		case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
			return fmt.Errorf("%w: %w", ErrCorrupt, err)
		case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
			return fmt.Errorf("%w: %w", ErrLocked, err)
		}
	case errors.Is(err, os.ErrPermission), isReadOnly(err):
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	case isFull(err):
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
