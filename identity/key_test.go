package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestKeyTextForms(t *testing.T) {
	m, n, d := NewMachine(), NewNode(), NewDisco()
	for _, k := range []struct{ text, prefix string }{
		{m.Public().String(), "mkey:"},
		{n.Public().String(), "nodekey:"},
		{d.Public().String(), "discokey:"},
		{m.Secret(), "privkey:"},
		{n.Secret(), "privkey:"},
	} {
		if len(k.text) != len(k.prefix)+64 || !strings.HasPrefix(k.text, k.prefix) || k.text != strings.ToLower(k.text) {
			t.Errorf("text form %q: want %s and 64 lower-case hex digits", k.text, k.prefix)
		}
	}
	if got, err := ParseMachinePrivate(m.Secret()); err != nil || !got.Equal(m) {
		t.Errorf("machine key does not survive its text form: %v", err)
	}
	if got, err := ParseNodePublic(strings.ToUpper(n.Public().String()[8:])); err == nil {
		t.Errorf("parsed a key without prefix: %v", got)
	}
	upper := "nodekey:" + strings.ToUpper(n.Public().String()[8:])
	if got, err := ParseNodePublic(upper); err != nil || got != n.Public() {
		t.Errorf("upper-case digits: %v", err)
	}
}

func TestKeyTextRefused(t *testing.T) {
	good := NewNode().Public().String()
	for _, text := range []string{"", "nodekey:", good[:len(good)-1], good + "0", " " + good, good + "\n", "mkey:" + good[8:], good[:10] + "g" + good[11:]} {
		if _, err := ParseNodePublic(text); !errors.Is(err, ErrBadKey) {
			t.Errorf("ParseNodePublic(%q) = %v, want ErrBadKey", text, err)
		}
		var v struct{ K NodePublic }
		quoted, _ := json.Marshal(text)
		if err := json.Unmarshal([]byte(`{"K":`+string(quoted)+`}`), &v); err == nil {
			t.Errorf("JSON %q accepted", text)
		}
	}
}

func TestZeroKeyIsWritten(t *testing.T) {
	b, err := json.Marshal(struct {
		A NodePublic
		B DiscoPublic `json:",omitzero"`
	}{})
	if err != nil || string(b) != `{"A":"nodekey:`+strings.Repeat("0", 64)+`"}` {
		t.Errorf("got %s, %v", b, err)
	}
}

func TestPrivateKeysDoNotLeak(t *testing.T) {
	m, n, d := NewMachine(), NewNode(), NewDisco()
	shared := n.Shared(NewNode().Public())
	core, logs := observer.New(zapcore.DebugLevel)
	log := zap.New(core)
	log.Info("keys", zap.Any("m", m), zap.Any("n", n), zap.Any("d", d), zap.Any("s", shared), zap.Reflect("r", []any{m, n, d}))
	enc := zapcore.NewJSONEncoder(zapcore.EncoderConfig{})
	entry := logs.All()[0]
	line, err := enc.EncodeEntry(entry.Entry, entry.Context)
	if err != nil {
		t.Fatal(err)
	}
	out := line.String() + fmt.Sprintf("%v %+v %#v %s %x %d", m, n, d, m, n, m) + fmt.Sprintf("%v %x", shared, *shared)
	js, err := json.Marshal([]any{m, n, d, shared})
	if err != nil {
		t.Fatal(err)
	}
	out += string(js)
	mb, nb := m.Bytes(), n.Bytes()
	for _, secret := range []string{m.Secret()[8:], n.Secret()[8:], fmt.Sprintf("%x", d.k), fmt.Sprint(mb[:4])[1:], fmt.Sprint(nb[:4])[1:]} {
		if strings.Contains(out, strings.TrimSuffix(secret, "]")) {
			t.Errorf("a private key leaked into %s", out)
		}
	}
}

func TestBox(t *testing.T) {
	a, b, c := NewDisco(), NewDisco(), NewDisco()
	sealed := a.Shared(b.Public()).Seal([]byte("head"), []byte("hello"))
	if len(sealed) != 4+BoxOverhead+5 {
		t.Fatalf("sealed length %d", len(sealed))
	}
	sealed = sealed[4:]
	got, ok := b.Shared(a.Public()).Open(nil, sealed)
	if !ok || string(got) != "hello" {
		t.Fatalf("Open = %q, %v", got, ok)
	}
	if _, ok := c.Shared(a.Public()).Open(nil, sealed); ok {
		t.Error("a stranger opened the box")
	}
	for i := range sealed {
		sealed[i] ^= 1
		if _, ok := b.Shared(a.Public()).Open(nil, sealed); ok {
			t.Errorf("bit flip at %d not noticed", i)
		}
		sealed[i] ^= 1
		if _, ok := b.Shared(a.Public()).Open(nil, sealed[:i]); ok {
			t.Errorf("truncation to %d not noticed", i)
		}
	}
}

func FuzzKeyText(f *testing.F) {
	f.Add(NewNode().Public().String())
	f.Add(NewMachine().Public().String())
	f.Add(NewMachine().Secret())
	f.Add("discokey:")
	f.Fuzz(func(t *testing.T, text string) {
		if k, err := ParseNodePublic(text); err == nil && !strings.EqualFold(k.String(), text) {
			t.Errorf("%q reads as %v", text, k)
		}
		if k, err := ParseMachinePublic(text); err == nil && !strings.EqualFold(k.String(), text) {
			t.Errorf("%q reads as %v", text, k)
		}
		if k, err := ParseDiscoPublic(text); err == nil && !strings.EqualFold(k.String(), text) {
			t.Errorf("%q reads as %v", text, k)
		}
		if k, err := ParseNodePrivate(text); err == nil && !strings.EqualFold(k.Secret(), text) {
			t.Errorf("%q reads as another private key", text)
		}
		if _, err := ParseMachinePrivate(text); err != nil && len(text) > 20 && strings.Contains(err.Error(), text) {
			t.Error("the error repeats the text, which may be a secret")
		}
	})
}
