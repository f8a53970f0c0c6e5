package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"mesh/control/admin"
	"mesh/control/host"
)

// adminTimeout bounds a command of an administrator.
const adminTimeout = 60 * time.Second

// dataFlag is the server's data directory, the same for all commands.
func dataFlag(fs *flag.FlagSet) *string {
	return fs.String("data", "", "data `DIR` (default $MESH_DATA or USER-CONFIG-DIR/mesh-server)")
}

// dataDir is the directory that a --data flag means.
func dataDir(flag string) (string, error) {
	if flag != "" {
		return flag, nil
	}
	if dir := os.Getenv("MESH_DATA"); dir != "" {
		return dir, nil
	}
	return configDir("mesh-server")
}

// configDir is a directory of ours in the user's config directory.
func configDir(name string) (string, error) {
	base, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no place for the data: %w; give --data", err)
	}
	return filepath.Join(base, name), nil
}

// adminCommand is the body of a command that talks to the server.
type adminCommand func(context.Context, *call, *admin.Client) error

// withServer binds --data and connects do to the server that it means.
func withServer(fs *flag.FlagSet, do adminCommand) func(context.Context, *call) error {
	data := dataFlag(fs)
	return func(ctx context.Context, c *call) error {
		dir, err := dataDir(*data)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, adminTimeout)
		defer cancel()
		return do(ctx, c, admin.NewClient(filepath.Join(dir, host.SocketName)))
	}
}
