package identity

import (
	"errors"
	"strings"
	"testing"
)

func TestStateSurvives(t *testing.T) {
	var s MemoryStore
	a, err := LoadState(&s)
	if err != nil {
		t.Fatal(err)
	}
	a.Enrolled = true
	if err := a.Save(&s); err != nil {
		t.Fatal(err)
	}
	b, err := LoadState(&s)
	if err != nil || !b.Machine.Equal(a.Machine) || !b.Node.Equal(a.Node) || !b.Enrolled {
		t.Errorf("read back another state: %v", err)
	}
}

func TestDamagedStateIsRefusedAndKept(t *testing.T) {
	var good MemoryStore
	if _, err := LoadState(&good); err != nil {
		t.Fatal(err)
	}
	text, _ := good.Read(stateName)
	zero := strings.Repeat("0", 64)
	for name, bad := range map[string]string{
		"empty":     "",
		"cut":       string(text[:len(text)/2]),
		"version":   strings.Replace(string(text), `"version":1`, `"version":9`, 1),
		"key":       strings.Replace(string(text), `privkey:`, `privkex:`, 1),
		"zero keys": `{"version":1,"machineKey":"privkey:` + zero + `","nodeKey":"privkey:` + zero + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			var s MemoryStore
			s.Write(stateName, []byte(bad))
			_, err := LoadState(&s)
			if !errors.Is(err, ErrBadState) || !strings.Contains(err.Error(), "enrol this node anew") {
				t.Errorf("got %v", err)
			}
			if after, _ := s.Read(stateName); string(after) != bad {
				t.Error("the damaged state was overwritten")
			}
		})
	}
}

func FuzzState(f *testing.F) {
	var good MemoryStore
	LoadState(&good)
	text, _ := good.Read(stateName)
	f.Add(text)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s MemoryStore
		s.Write(stateName, b)
		st, err := LoadState(&s)
		if err == nil && (st.Machine.IsZero() || st.Node.IsZero()) {
			t.Error("accepted a zero key")
		}
		if err != nil && !errors.Is(err, ErrBadState) {
			t.Errorf("error of another kind: %v", err)
		}
	})
}
