package arch

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite testdata/linked.txt")

const maxLines = 600

type pkg struct {
	ImportPath   string
	Dir          string
	Standard     bool
	Module       *struct{ Path string }
	Doc          string
	GoFiles      []string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func (p pkg) folder() string {
	if p.ImportPath == "mesh" {
		return "."
	}
	return strings.TrimPrefix(p.ImportPath, "mesh/")
}

func goList(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,Standard,Module,Doc,GoFiles,Imports,TestImports,XTestImports"}, args...)...)
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	return pkgs
}

// fields reads a table of testdata, without comments.
func fields(t *testing.T, name string) [][]string {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var rows [][]string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line, _, _ := strings.Cut(sc.Text(), "#")
		if row := strings.Fields(line); len(row) > 0 {
			rows = append(rows, row)
		}
	}
	return rows
}

func TestImportsPointDown(t *testing.T) {
	level := map[string]int{}
	for _, row := range fields(t, "levels.txt") {
		n, err := strconv.Atoi(row[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, folder := range row[1:] {
			level[folder] = n
		}
	}
	for _, p := range goList(t, "./...") {
		mine, ok := level[p.folder()]
		if !ok {
			t.Errorf("%s has no line in testdata/levels.txt", p.folder())
			continue
		}
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if imp != "mesh" && !strings.HasPrefix(imp, "mesh/") || imp == p.ImportPath {
				continue
			}
			target := pkg{ImportPath: imp}.folder()
			if theirs, ok := level[target]; !ok || theirs >= mine {
				t.Errorf("%s (level %d) must not import %s (level %d)", p.folder(), mine, target, theirs)
			}
		}
	}
}

func TestOnlyOnePackageImports(t *testing.T) {
	pkgs := goList(t, "./...")
	for _, row := range fields(t, "only.txt") {
		for _, p := range pkgs {
			for _, imp := range p.Imports {
				if (imp == row[0] || strings.HasPrefix(imp, row[0]+"/")) && !slices.Contains(row[1:], p.folder()) {
					t.Errorf("%s imports %s: only %s may", p.folder(), imp, strings.Join(row[1:], ", "))
				}
			}
		}
	}
}

// What a program links that imports mesh is a reviewed list: a new line in it
// is a decision, not an accident.
func TestLinkedPackages(t *testing.T) {
	var linked []string
	for _, p := range goList(t, "-deps", ".") {
		if !p.Standard {
			linked = append(linked, p.ImportPath)
		}
	}
	sort.Strings(linked)
	got := strings.Join(linked, "\n") + "\n"
	file := filepath.Join("testdata", "linked.txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, line := range strings.Fields(string(want)) {
		have[line] = true
	}
	for _, p := range linked {
		if !have[p] {
			t.Errorf("import \"mesh\" newly links %s; if it must, run go test ./internal/arch -update", p)
		}
		delete(have, p)
	}
	for p := range have {
		t.Errorf("import \"mesh\" no longer links %s; run go test ./internal/arch -update", p)
	}
	for _, p := range linked {
		for _, never := range []string{"mesh/control/server", "mesh/control/store", "mesh/control/policy", "mesh/control/admin", "mesh/derp/relay", "modernc.org/", "github.com/tailscale/hujson", "net/http/pprof"} {
			if strings.HasPrefix(p, never) {
				t.Errorf("import \"mesh\" must not link %s", p)
			}
		}
	}
}

func TestPackagesAreDocumentedAndFilesShort(t *testing.T) {
	for _, p := range goList(t, "./...") {
		if p.Doc == "" && len(p.GoFiles) > 0 {
			t.Errorf("%s has no package comment", p.folder())
		}
		for _, bad := range []string{"util", "utils", "common", "misc", "helpers"} {
			if filepath.Base(p.folder()) == bad {
				t.Errorf("%s: a package is named for what it does", p.folder())
			}
		}
		for _, f := range p.GoFiles {
			b, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			if n := bytes.Count(b, []byte("\n")); n > maxLines {
				t.Errorf("%s/%s has %d lines, more than %d: split it by what it does", p.folder(), f, n, maxLines)
			}
		}
	}
}

// Library code starts no program and no shell, and sets no environment.
func TestNoProcessesInLibraryCode(t *testing.T) {
	for _, p := range goList(t, "./...") {
		top, _, _ := strings.Cut(strings.TrimPrefix(p.folder(), "internal/"), "/")
		if slices.Contains([]string{"examples", "actor", "e2e", "interop", "loadtest", "meshtest", "natlab", "pgserver"}, top) {
			continue // programs and tests
		}
		if slices.Contains(p.Imports, "os/exec") {
			t.Errorf("%s imports os/exec", p.folder())
		}
		for _, f := range p.GoFiles {
			src, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			for _, call := range []string{"os.Setenv(", "zap.L()", "zap.S()", "zap.ReplaceGlobals("} {
				if bytes.Contains(src, []byte(call)) {
					t.Errorf("%s calls %s: no process-wide state", p.folder()+"/"+f, call)
				}
			}
		}
	}
}
