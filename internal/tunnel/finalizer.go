package tunnel

import (
	"reflect"
	"runtime"

	"golang.zx2c4.com/wireguard/device"
)

// dropFinalizers takes the finalizers off the queues of a peer that the Device
// is about to forget. They would return stragglers to pools, which matters only
// where those are bounded (there they stay). What they break is virtual time: a
// finalizer runs outside the bubble of a test and may not touch its channels,
// so any garbage collection after a peer was removed would end the test binary.
//
// The fields are the Device's own. If they change, nothing happens here.
func dropFinalizers(p *device.Peer) {
	if p == nil || device.PreallocatedBuffersPerPool != 0 {
		return
	}
	queue := reflect.ValueOf(p).Elem().FieldByName("queue")
	if queue.Kind() != reflect.Struct {
		return
	}
	for _, name := range []string{"outbound", "inbound"} {
		if q := queue.FieldByName(name); q.Kind() == reflect.Pointer && !q.IsNil() {
			runtime.SetFinalizer((*byte)(q.UnsafePointer()), nil)
		}
	}
}
