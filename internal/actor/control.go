package actor

import (
	"encoding/json"
	"errors"
	"time"

	"mesh/control/host"
)

// ControlReady is what a control server process says when it runs.
type ControlReady struct{ URL, Addr, Socket string }

func playControl(config json.RawMessage) (*part, error) {
	var c struct{ DataDir, Listen, Policy string }
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	h, err := host.Start(host.Config{DataDir: c.DataDir, Listen: c.Listen, PolicyFile: c.Policy, NoRelay: true})
	if err != nil {
		return nil, err
	}
	return &part{ready: ControlReady{h.URL(), h.Addr(), h.Socket()}, close: h.Close}, nil
}

func playRelay(config json.RawMessage) (*part, error) {
	var c struct{ DataDir, ControlURL, RelayKey string }
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	r, err := host.StartRelay(host.RelayConfig{
		DataDir: c.DataDir, Listen: "127.0.0.1:0", STUN: "127.0.0.1:0",
		ControlURL: c.ControlURL, RelayKey: c.RelayKey,
	})
	if err != nil {
		return nil, err
	}
	select {
	case <-r.Announced():
	case err := <-r.Failed():
		return nil, errors.Join(err, r.Close())
	case <-time.After(Patience):
		return nil, errors.Join(errors.New("not announced"), r.Close())
	}
	return &part{ready: struct{ Region int }{r.Region()}, close: r.Close}, nil
}
