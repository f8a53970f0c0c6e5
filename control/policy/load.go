package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tailscale/hujson"
)

// load checks what the parser would choke on, and parses.
func (r *reader) load() (hujson.Value, bool) {
	var none hujson.Value
	switch {
	case len(r.src) > MaxSize:
		r.src = r.src[:0]
		r.fail(0, "", "policy is longer than %d bytes", MaxSize)
		return none, false
	case bytes.HasPrefix(r.src, []byte("\ufeff")):
		r.fail(0, "save the file without it", "policy starts with a byte order mark")
		return none, false
	}
	if at := invalidUTF8(r.src); at >= 0 {
		r.fail(at, "", "invalid UTF-8")
		return none, false
	}
	if at, msg := r.scan(); msg != "" {
		r.fail(at, "", "%s", msg)
		return none, false
	}
	// The parser does not see the end of a comment on a last line that has no
	// end itself.
	src := r.src
	if bytes.Contains(src[bytes.LastIndexByte(src, '\n')+1:], []byte("//")) {
		src = append(src[:len(src):len(src)], '\n')
	}
	root, err := hujson.Parse(src)
	if err != nil {
		line, column := 1, 1
		msg := err.Error()
		// The parser tells the position in its message only.
		if n, _ := fmt.Sscanf(msg, "hujson: line %d, column %d:", &line, &column); n == 2 {
			_, msg, _ = strings.Cut(msg, ", column ")
			_, msg, _ = strings.Cut(msg, ": ")
		}
		r.errs = append(r.errs, &Error{Line: line, Column: column, Msg: msg})
		return none, false
	}
	return root, true
}

func invalidUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		c, n := utf8.DecodeRune(b[i:])
		if c == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// scan bounds nesting and the number of values without recursion. It skips
// strings and comments; other mistakes are the parser's to find.
func (r *reader) scan() (at int, msg string) {
	depth, values := 0, 0
	for i := 0; i < len(r.src); i++ {
		switch c := r.src[i]; c {
		case '"':
			for i++; i < len(r.src) && r.src[i] != '"'; i++ {
				if r.src[i] == '\\' {
					i++
				}
			}
		case '/':
			rest := r.src[i:]
			end := -1
			switch {
			case bytes.HasPrefix(rest, []byte("//")):
				end = bytes.IndexByte(rest, '\n')
			case bytes.HasPrefix(rest, []byte("/*")):
				if end = bytes.Index(rest[2:], []byte("*/")); end >= 0 {
					end += 3
				}
			default:
				continue
			}
			if end < 0 {
				return 0, ""
			}
			i += end
		case '{', '[':
			if depth++; depth > maxDepth {
				return i, fmt.Sprintf("more than %d levels of nesting", maxDepth)
			}
			values++
		case '}', ']':
			depth--
		case ',', ':':
			values++
		}
		if values > maxValues {
			return i, fmt.Sprintf("more than %d values", maxValues)
		}
	}
	return 0, ""
}

// position takes about the same time wherever at is, even in one long line.
func (r *reader) position(at int) (line, column int) {
	if r.lineStarts == nil {
		r.lineStarts = []int{0}
		for i, c := range r.src {
			if c == '\n' {
				r.lineStarts = append(r.lineStarts, i+1)
			}
		}
		n := 0
		for i, c := range r.src {
			if i%runeBlock == 0 {
				r.runesAt = append(r.runesAt, n)
			}
			if utf8.RuneStart(c) {
				n++
			}
		}
		r.runesAt = append(r.runesAt, n)
	}
	i, found := slices.BinarySearch(r.lineStarts, at)
	if !found {
		i--
	}
	return i + 1, r.runesBefore(at) - r.runesBefore(r.lineStarts[i]) + 1
}

const runeBlock = 512

// runesBefore counts the characters before a byte of the file.
func (r *reader) runesBefore(at int) int {
	n := r.runesAt[min(at/runeBlock, len(r.runesAt)-1)]
	for _, c := range r.src[min(at/runeBlock*runeBlock, len(r.src)):min(at, len(r.src))] {
		if utf8.RuneStart(c) {
			n++
		}
	}
	return n
}
