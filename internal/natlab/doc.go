// Package natlab builds real networks of kernel namespaces: an internet with
// public hosts, and sites behind routers that translate and filter addresses as
// those in homes, offices and at mobile carriers do. Processes of package actor
// run in their hosts. It is the counterpart of package vnet on real kernels.
//
// Everything happens in a network and mount namespace that the test binary makes
// for itself (Main), so nothing reaches or changes the machine around it. It
// needs Linux, root, and the programs ip, nft and conntrack; elsewhere the tests
// skip.
package natlab
