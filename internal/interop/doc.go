// Package interop holds the tests that judge this project by code that it did
// not write: stock clients on our control server and relay, our nodes on stock
// servers, and both in one mesh.
//
// The suite is compiled with the root module alone; the stock side runs in
// processes of its own, built by the modules v90 and v102, one for each stock
// version. Run it there: `cd internal/interop/v102 && go test ./...`. Started
// any other way it skips.
//
// Everything happens in a network namespace that the test binary makes for
// itself, with loopback and a veth pair, since stock clients pause when only
// loopback is up and try to reach their vendor. So the suite needs Linux and
// root or user namespaces.
package interop
