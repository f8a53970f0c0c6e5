package netmap

import (
	"reflect"
	"slices"
	"time"

	"mesh/control/wire"
)

// sameNode reports whether two nodes say the same. It is reflect.DeepEqual, for
// the sake of maps of thousands of nodes that control sends once more.
func sameNode(a, b *wire.Node) bool {
	return a == b || a.ID == b.ID && a.StableID == b.StableID && a.Name == b.Name && a.User == b.User &&
		a.Key == b.Key && a.KeyExpiry == b.KeyExpiry && a.Machine == b.Machine && a.DiscoKey == b.DiscoKey &&
		sameList(a.Addresses, b.Addresses) && sameList(a.AllowedIPs, b.AllowedIPs) && sameList(a.Endpoints, b.Endpoints) &&
		a.HomeDERP == b.HomeDERP && a.LegacyDERP == b.LegacyDERP && sameHost(a.Hostinfo, b.Hostinfo) &&
		a.Created == b.Created && a.Cap == b.Cap && sameList(a.Tags, b.Tags) &&
		sameList(a.PrimaryRoutes, b.PrimaryRoutes) && samePointer(a.LastSeen, b.LastSeen) && samePointer(a.Online, b.Online) &&
		a.MachineAuthorized == b.MachineAuthorized && sameList(a.Capabilities, b.Capabilities) &&
		(a.CapMap == nil && b.CapMap == nil || reflect.DeepEqual(a.CapMap, b.CapMap)) &&
		a.Expired == b.Expired && a.UnsignedPeerAPIOnly == b.UnsignedPeerAPIOnly && a.IsJailed == b.IsJailed &&
		a.IsWireGuardOnly == b.IsWireGuardOnly && samePointer(a.MeshRenew, b.MeshRenew)
}

func sameHost(a, b *wire.Hostinfo) bool {
	if a == b || a == nil || b == nil {
		return a == b
	}
	return a.IPNVersion == b.IPNVersion && a.BackendLogID == b.BackendLogID && a.OS == b.OS && a.OSVersion == b.OSVersion &&
		a.Hostname == b.Hostname && a.GoArch == b.GoArch && a.GoVersion == b.GoVersion && a.Package == b.Package &&
		a.App == b.App && a.ShieldsUp == b.ShieldsUp && sameList(a.RoutableIPs, b.RoutableIPs) &&
		sameList(a.RequestTags, b.RequestTags) && sameList(a.Services, b.Services) &&
		(a.NetInfo == b.NetInfo || reflect.DeepEqual(a.NetInfo, b.NetInfo)) && samePointer(a.Userspace, b.Userspace)
}

// sameList tells a list that is empty from one that is not there: some members
// mean different things by that.
func sameList[T comparable](a, b []T) bool { return (a == nil) == (b == nil) && slices.Equal(a, b) }

func samePointer[T bool | time.Time](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}
