package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"mesh/control/host"
	"mesh/identity"
)

// runControl is the control plane. `mesh serve` does the same; the relay, which
// it would run too, has a process of its own in this story.
func runControl(orders <-chan order, events *reporter) error {
	h, err := host.Start(host.Config{
		DataDir: os.Getenv("QUICKSTART_DIR"),
		Listen:  orDefault(os.Getenv("QUICKSTART_LISTEN"), "127.0.0.1:0"),
		NoRelay: true,
	})
	if err != nil {
		return err
	}
	defer h.Close()
	events.send(event{Event: evReady, URL: h.URL(), Key: h.Key().String(), Addr: h.Addr(), Socket: h.Socket()})
	select {
	case <-orders: // closed when the story ends
		return nil
	case err := <-h.Failed():
		return err
	}
}

// runRelay is the relay, as `mesh relay` runs it.
func runRelay(orders <-chan order, events *reporter) error {
	pin, err := identity.ParseMachinePublic(os.Getenv("MESH_CONTROL_KEY"))
	if err != nil {
		return err
	}
	r, err := host.StartRelay(host.RelayConfig{
		DataDir:    os.Getenv("QUICKSTART_DIR"),
		Listen:     "127.0.0.1:0",
		STUN:       "127.0.0.1:0",
		ControlURL: os.Getenv("MESH_CONTROL_URL"),
		ControlKey: pin,
		RelayKey:   os.Getenv("MESH_RELAY_KEY"),
	})
	if err != nil {
		return err
	}
	defer r.Close()
	select {
	case <-r.Announced():
	case err := <-r.Failed():
		return err
	case <-orders:
		return nil
	}
	events.send(event{Event: evReady, Addr: r.Addr()})
	select {
	case <-orders:
		return nil
	case err := <-r.Failed():
		return err
	}
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// child is one of the processes of the story. It returns the exit status.
func child(role string) int {
	ctx, orders, events := fromParent()
	var err error
	switch role {
	case "control":
		err = runControl(orders, events)
	case "relay":
		err = runRelay(orders, events)
	case "planner", "database", "image":
		err = runAgent(ctx, role, orders, events)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		events.send(event{Event: evFailed, Error: err.Error()})
		return 1
	}
	return 0
}
