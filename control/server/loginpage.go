package server

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"strings"

	"go.uber.org/zap"
)

const loginStyle = `body{font:16px/1.5 sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem}` +
	`td{padding:0 1rem 0 0;vertical-align:top}pre{background:#eee;padding:1rem;overflow-x:auto}`

// loginPage says who asks and how an administrator answers. It does nothing by
// itself: looking at it approves nothing.
var loginPage = template.Must(template.New("login").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mesh login</title><style>` + loginStyle + `</style></head><body>
{{if .}}<h1>{{.Title}}</h1>
<table>
<tr><td>name</td><td>{{.Name}}</td></tr>
<tr><td>system</td><td>{{.OS}}</td></tr>
{{if .Tags}}<tr><td>asks for</td><td>{{.Tags}}</td></tr>
{{end}}<tr><td>machine key</td><td>{{.Machine}}</td></tr>
<tr><td>node key</td><td>{{.Key}}</td></tr>
</table>
{{if .Code}}<p>To let it in, an administrator of this mesh runs, on the server:</p>
<pre>mesh node approve {{.Code}} --user NAME</pre>
<p>Do so only if you know that this machine is yours: whoever sent you here may
have started it. The machine's own description of itself is not proven; its keys are.</p>
{{end}}{{else}}<h1>No such login</h1>
<p>It may be over: start it again at the machine.</p>
{{end}}</body></html>
`))

// loginView is what the page shows.
type loginView struct {
	Title, Name, OS, Tags, Machine, Key string
	Code                                string // "" = decided
}

var loginPolicy = func() string {
	sum := sha256.Sum256([]byte(loginStyle))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// serveLogin is GET /login/{code}, for a user's browser.
func (s *Server) serveLogin(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", loginPolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	v := s.viewLogin(r.PathValue("code"))
	if v == nil {
		w.WriteHeader(http.StatusNotFound)
	}
	if err := loginPage.Execute(w, v); err != nil {
		s.log.Debug("login page was not delivered", zap.Error(err))
	}
}

// viewLogin describes a login; nil = there is none.
func (s *Server) viewLogin(code string) *loginView {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.logins.find(code, s.cfg.Now())
	if l == nil {
		return nil
	}
	v := &loginView{
		Name: label(l.info.Hostname), OS: plain(l.info.OS), Tags: strings.Join(l.tags, " "),
		Machine: keyStart(l.machine), Key: keyStart(l.key),
	}
	switch l.state {
	case loginPending:
		v.Title, v.Code = "A machine asks to join the mesh "+s.cfg.Domain, l.code
	case loginApproved:
		v.Title = "This machine was let in"
	case loginRejected:
		v.Title = "This machine was turned away"
	}
	return v
}

// keyStart is enough of a key's text for people to compare.
func keyStart(k fmt.Stringer) string {
	prefix, digits, _ := strings.Cut(k.String(), ":")
	return prefix + ":" + digits[:min(16, len(digits))] + "…"
}

// plain is what a page or a terminal can show of a text without being fooled:
// printable ASCII.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f {
			return -1
		}
		return r
	}, clip(s))
}
