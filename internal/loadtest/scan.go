package loadtest

import (
	"bytes"
	"errors"
	"fmt"
)

// Decoding every peer of every map with encoding/json would cost the load
// program more than the server spends on making them. What is below only finds
// where the parts of a message begin and end; each distinct part is decoded
// once.

var errJSON = errors.New("malformed JSON")

// members calls f for each member of the object b, with its value as it stands.
func members(b []byte, f func(key, value []byte) error) error {
	return list(b, '{', '}', func(i int) (int, error) {
		end, err := skip(b, i)
		if err != nil || b[i] != '"' {
			return 0, errJSON
		}
		key := b[i+1 : end-1]
		i = space(b, end)
		if i >= len(b) || b[i] != ':' {
			return 0, errJSON
		}
		i = space(b, i+1)
		if end, err = skip(b, i); err != nil {
			return 0, err
		}
		return end, f(key, b[i:end])
	})
}

// elements calls f for each element of the array b, or not at all for null.
func elements(b []byte, f func(value []byte) error) error {
	if string(b) == "null" {
		return nil
	}
	return list(b, '[', ']', func(i int) (int, error) {
		end, err := skip(b, i)
		if err != nil {
			return 0, err
		}
		return end, f(b[i:end])
	})
}

// list calls item with the start of each item between the brackets of b; item
// returns where it ends.
func list(b []byte, first, last byte, item func(i int) (int, error)) error {
	i := space(b, 0)
	if i >= len(b) || b[i] != first {
		return fmt.Errorf("%w: want %c", errJSON, first)
	}
	i = space(b, i+1)
	if i < len(b) && b[i] == last {
		return nil
	}
	for i < len(b) {
		end, err := item(i)
		if err != nil {
			return err
		}
		i = space(b, end)
		switch {
		case i >= len(b):
		case b[i] == ',':
			i = space(b, i+1)
			continue
		case b[i] == last:
			return nil
		}
		break
	}
	return errJSON
}

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// skip returns the end of the value that starts at i.
func skip(b []byte, i int) (int, error) {
	depth := 0
	for i < len(b) {
		switch b[i] {
		case '"':
			i++
			for {
				n := bytes.IndexByte(b[i:], '"')
				if n < 0 {
					return 0, errJSON
				}
				i += n + 1
				if !escaped(b[:i-1]) {
					break
				}
			}
		case '{', '[':
			depth++
			i++
			continue
		case '}', ']':
			depth--
			i++
		case ',', ':', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return 0, errJSON
			}
			i++
			continue
		default: // a number, true, false, null
			for i < len(b) && b[i] != ',' && b[i] != '}' && b[i] != ']' && b[i] != ' ' && b[i] != '\n' && b[i] != ':' {
				i++
			}
		}
		if depth == 0 {
			return i, nil
		}
		if depth < 0 {
			break
		}
	}
	return 0, errJSON
}

// escaped reports whether what follows b in a string is escaped.
func escaped(b []byte) bool {
	n := 0
	for n < len(b) && b[len(b)-1-n] == '\\' {
		n++
	}
	return n%2 == 1
}
