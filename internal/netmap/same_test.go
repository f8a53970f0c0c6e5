package netmap

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// fill gives v a value that is not zero.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1<<31, 0)))
		return
	case netip.Prefix:
		v.Set(reflect.ValueOf(netip.MustParsePrefix("192.0.2.1/32")))
		return
	case netip.AddrPort:
		v.Set(reflect.ValueOf(netip.MustParseAddrPort("192.0.2.1:1")))
		return
	case json.RawMessage:
		v.Set(reflect.ValueOf(json.RawMessage("1")))
		return
	case wire.NodeKey:
		v.Set(reflect.ValueOf(key(7)))
		return
	case wire.DiscoKey:
		v.Set(reflect.ValueOf(disco(7)))
		return
	case wire.MachineKey:
		v.Set(reflect.ValueOf(identity.NewMachine().Public()))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint16:
		v.SetUint(7)
	case reflect.Float64:
		v.SetFloat(7)
	case reflect.String:
		v.SetString("x")
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(t, v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(t, k)
		fill(t, e)
		v.SetMapIndex(k, e)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(t, v.Field(i))
			}
		}
	default:
		t.Fatalf("no value for %v", v.Type())
	}
}

// TestSameNode changes every member of a node, and of what its members point to:
// one that sameNode forgets would hide what control says.
func TestSameNode(t *testing.T) {
	var each func(path string, v reflect.Value, check func(string))
	each = func(path string, v reflect.Value, check func(string)) {
		for i := range v.NumField() {
			f, name := v.Field(i), path+v.Type().Field(i).Name
			was := reflect.New(f.Type()).Elem()
			was.Set(f)
			fill(t, f)
			check(name)
			if f.Kind() == reflect.Pointer && f.Elem().Kind() == reflect.Struct && f.Type() != reflect.TypeFor[*time.Time]() {
				each(name+".", f.Elem(), check)
			}
			f.Set(was)
		}
	}
	var n wire.Node
	members := 0
	each("", reflect.ValueOf(&n).Elem(), func(name string) {
		members++
		var none wire.Node
		with := none
		with.Hostinfo = &wire.Hostinfo{} // what is inside a pointer differs from an empty one
		if sameNode(&n, &none) || sameNode(&none, &n) || name != "Hostinfo" && sameNode(&n, &with) {
			t.Errorf("a difference in %s goes unnoticed", name)
		}
		if c := n; !sameNode(&n, &c) {
			t.Errorf("with %s a node is not the same as itself", name)
		}
	})
	if members < 40 {
		t.Errorf("only %d members were changed", members)
	}
	a, b := &wire.Node{Tags: []string{}}, &wire.Node{}
	if sameNode(a, b) {
		t.Error("an empty list is not the same as none")
	}
}
