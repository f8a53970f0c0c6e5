package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"mesh/control/admin"
	"mesh/control/store"
)

var backupCommand = &command{
	name: "backup", args: "FILE", min: 1, max: 1,
	short: "copy the data of a running server to a file",
	long: `
The copy is all of it at one moment, the keys of nodes and server included: keep it
as safe as the server. FILE must not exist; in the end it is there whole, or not at
all. To restore, stop the server, put the copy in the place of mesh.db in the data
directory, remove mesh.db-wal and mesh.db-shm, and start it. What happened after the
copy is forgotten then: nodes and keys that were removed since are back, so remove
them again (mesh audit of before the restore lists them). The server notices an older
copy, by what it kept beside the database and by what nodes know: it says so in its log
and in mesh audit, as store.restored.

Data in PostgreSQL is backed up with pg_dump.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			path, err := filepath.Abs(c.args[0])
			if err != nil {
				return err
			}
			return s.Backup(ctx, admin.Backup{Path: path})
		})
	},
}

var migrateCommand = &command{
	name:  "migrate",
	short: "copy the data of a stopped server from its file to PostgreSQL",
	long: `
All of it is copied, compared and only then made valid: nodes keep their identity and
notice nothing when mesh serve --database continues with it. The database must be an
empty one. The file is left as it is.`,
	setup: func(flags *flag.FlagSet) func(context.Context, *call) error {
		from := flags.String("from", "", "`FILE`, such as DATA/mesh.db")
		to := flags.String("to", "", "PostgreSQL `URL` (default $MESH_DATABASE)")
		return func(ctx context.Context, c *call) error {
			if *to == "" {
				*to = os.Getenv("MESH_DATABASE")
			}
			switch {
			case *from == "" || *to == "":
				return usageError{"give --from FILE and --to postgres://USER@HOST/NAME"}
			case !isPostgres(*to):
				return usageError{"--to: want postgres://USER@HOST/NAME"}
			}
			if _, err := os.Stat(*from); errors.Is(err, fs.ErrNotExist) {
				return err // instead of making an empty one
			}
			file, err := store.OpenSQLite(ctx, *from)
			if err != nil {
				return err
			}
			defer file.Close()
			pg, err := store.OpenPostgres(ctx, *to)
			if err != nil {
				return err
			}
			defer pg.Close()
			rows, err := store.Transfer(ctx, file, pg)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%d rows copied and compared\n", rows)
			return nil
		}
	},
}
