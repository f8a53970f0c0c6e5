package server

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"

	"mesh/control/admin"
	"mesh/control/store"
)

// adminBackup writes a copy of the store to a file of the server's machine.
func (s *Server) adminBackup(r *http.Request) (any, error) {
	var in admin.Backup
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	file, ok := s.store.(interface {
		Backup(ctx context.Context, path string) error
	})
	switch {
	case !ok:
		return nil, fmt.Errorf("%w: the data is in PostgreSQL: back it up with pg_dump", errInvalid)
	case !filepath.IsAbs(in.Path) || filepath.Clean(in.Path) != in.Path:
		return nil, fmt.Errorf("%w: want an absolute path", errInvalid)
	}
	// On record first, so that the copy says that it is one.
	if err := s.store.Note(r.Context(), actor(r), "store.backup", filepath.Base(in.Path), "", s.cfg.Now()); err != nil {
		return nil, err
	}
	err := file.Backup(r.Context(), in.Path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrConflict, err)
	}
	return struct{}{}, nil
}
