// Package e2e tests package mesh and the binary from outside, against real
// servers.
package e2e
