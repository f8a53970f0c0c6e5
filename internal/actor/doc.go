// Package actor runs parts of a test in operating-system processes of their
// own, so that they can be killed, stopped or put into another network: control
// servers, relays and nodes.
//
// A process is the test binary itself, started again with a role. It gets its
// configuration as the first line of its standard input and answers with one
// line when it is ready; after that each line in is a request and each line out
// an answer, all of them JSON. It ends when its standard input does, and fails
// if it leaves goroutines behind.
package actor
