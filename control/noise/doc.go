// Package noise is the ts2021 transport between a node and its control server,
// both sides of it: an HTTP/1.1 upgrade that carries a Noise IK handshake,
// then encrypted records. Whoever runs HTTP/2 inside sees a net.Conn whose
// other end has proven its key.
//
// The records differ from the Noise specification in that their nonces count
// in big endian, and there is no rekeying.
package noise
