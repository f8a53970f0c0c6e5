package actor

import (
	"encoding/json"
	"errors"
	"time"

	"mesh/control/host"
	"mesh/identity"
)

// ControlConfig is what a control server process is told: see host.Config.
type ControlConfig struct {
	DataDir, Listen, URL string
	Policy               string // file, "" = the stored one
	Relay                bool   // with a relay, and STUN at the default port of STUN's address
	STUN                 string
	Database             string // URL, "" = a file in DataDir
}

// ControlReady is what a control server process says when it runs.
type ControlReady struct{ URL, Addr, Socket, Key string }

func playControl(config json.RawMessage) (*part, error) {
	var c ControlConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	h, err := host.Start(host.Config{
		DataDir: c.DataDir, Listen: c.Listen, URL: c.URL, PolicyFile: c.Policy, NoRelay: !c.Relay, STUN: c.STUN, Database: c.Database,
	})
	if err != nil {
		return nil, err
	}
	return &part{ready: ControlReady{h.URL(), h.Addr(), h.Socket(), h.Key().String()}, close: h.Close}, nil
}

// RelayConfig is what a relay process is told: see host.RelayConfig.
type RelayConfig struct {
	DataDir, ControlURL, ControlKey, RelayKey string
	Listen, STUN                              string
	Host                                      string
	Region                                    int
	Drain                                     time.Duration
}

// RelayReady is what a relay process says when the control server knows it.
type RelayReady struct{ Region int }

func playRelay(config json.RawMessage) (*part, error) {
	var c RelayConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	var pin identity.MachinePublic
	if c.ControlKey != "" {
		if err := pin.UnmarshalText([]byte(c.ControlKey)); err != nil {
			return nil, err
		}
	}
	r, err := host.StartRelay(host.RelayConfig{
		DataDir: c.DataDir, Listen: c.Listen, STUN: c.STUN, Host: c.Host, Region: c.Region,
		ControlURL: c.ControlURL, ControlKey: pin, RelayKey: c.RelayKey, Drain: c.Drain,
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
	return &part{ready: RelayReady{r.Region()}, close: r.Close}, nil
}
