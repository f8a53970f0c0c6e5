package policy

import (
	"fmt"
	"strings"
)

// nearest suggests the known word most like s. Of very long lists only the
// beginning is searched, and nothing is when the error will not be reported.
func (r *reader) nearest(s string, known []string) string {
	const longest, most = 64, 1000
	if len(s) > longest || len(r.errs) >= maxErrors {
		return ""
	}
	best, least := "", len(s)/3+1
	for _, k := range known[:min(len(known), most)] {
		if len(k) > longest {
			continue
		}
		if d := distance(strings.ToLower(s), strings.ToLower(k), least); d < least || d == least && best == "" {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", best)
}

// distance counts the single-byte edits between a and b; beyond most the exact
// count does not matter.
func distance(a, b string, most int) int {
	if len(a)-len(b) > most || len(b)-len(a) > most {
		return most + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
