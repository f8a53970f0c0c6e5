package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/identity"
)

// A database that was put back from an older copy has forgotten what was
// withdrawn since. The audit record only grows, and each change is in it: so the
// server keeps beside the database how far it saw the record, and looks for that
// when it starts. A data directory that was put back as a whole shows no
// difference; what nodes know does: see package server.
const (
	seenDir   = "seen"       // in the data directory
	seenFile  = "audit-head" // a store.AuditHead
	seenEvery = 5 * time.Second
)

// watchRecord compares the audit record with what was seen of it, puts on record
// if that is not there, and keeps what is seen from now on until the host closes.
// Where it cannot, the server does without.
func (h *Host) watchRecord() {
	files, err := identity.OpenFileStore(filepath.Join(h.cfg.DataDir, seenDir))
	if err != nil {
		h.log.Warn("whether the database is an older copy cannot be told", zap.Error(err))
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := h.compareRecord(ctx, files); err != nil {
		h.log.Error("whether the database is an older copy cannot be told, or not put on record", zap.Error(err))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.keepSeen(ctx, files)
	}()
	h.onClose(func() {
		cancel()
		<-done
		files.Close()
	})
}

func (h *Host) compareRecord(ctx context.Context, files *identity.FileStore) error {
	b, err := files.Read(seenFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var seen store.AuditHead
	if err := json.Unmarshal(b, &seen); err != nil {
		h.log.Warn("what was seen of the audit record is damaged: whether the database is an older copy cannot be told", zap.Error(err))
		return nil
	}
	if seen.ID == 0 {
		return nil
	}
	there, err := h.store.Audit(ctx, time.Time{}, seen.ID-1, 1)
	if err != nil || len(there) == 1 && there[0].ID == seen.ID && there[0].Hash == seen.Hash {
		return err
	}
	head, err := h.store.AuditHead(ctx)
	if err != nil {
		return err
	}
	detail := fmt.Sprintf("this server had seen the record up to %s, which is not in it; it now ends at %s: what was removed, revoked or suspended in between is in force again", seen, head)
	h.log.Error("the database is an older copy of itself: remove and revoke again what a record of before the restore lists", zap.Stringer("seen", seen), zap.Stringer("now", head))
	return h.store.Note(ctx, "server", "store.restored", "database", detail, time.Now())
}

// keepSeen writes down how far the record goes, until ctx ends, and once more
// then.
func (h *Host) keepSeen(ctx context.Context, files *identity.FileStore) {
	var kept store.AuditHead
	tick := time.NewTicker(seenEvery)
	defer tick.Stop()
	for {
		if head, err := h.store.AuditHead(context.WithoutCancel(ctx)); err == nil && head != kept {
			b, err := json.Marshal(head)
			if err == nil {
				err = files.Write(seenFile, b)
			}
			if err != nil {
				h.log.Warn("how far the audit record goes could not be kept", zap.Error(err))
			} else {
				kept = head
			}
		}
		select {
		case <-ctx.Done():
			return
		default:
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}
