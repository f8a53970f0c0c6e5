package noise

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"mesh/identity"
)

// What the HTTP upgrade is made of.
const (
	// Path is where a control server takes upgrades.
	Path = "/ts2021"

	upgradeToken    = "tailscale-control-protocol"
	handshakeHeader = "X-Tailscale-Handshake"

	handshakeTime = 10 * time.Second
	maxHead       = 64 << 10 // bytes of an HTTP answer that precede the handshake
)

// ErrClosed reports that the server closed the connection right after the
// upgrade, without a handshake. Servers do this to clients that are too old.
var ErrClosed = errors.New("server closed the connection before the handshake")

// UpgradeError is a server's refusal of the HTTP upgrade.
type UpgradeError struct {
	StatusCode int
	RetryAfter string // header of that name, "" if there was none
	Text       string // start of the body, as untrusted as it came
}

// Error returns status and text.
func (e *UpgradeError) Error() string {
	s := fmt.Sprintf("upgrade refused: HTTP status %d", e.StatusCode)
	if e.Text != "" {
		s += fmt.Sprintf(": %q", e.Text)
	}
	return s
}

// ClientConfig says how to reach a control server. All members are required.
type ClientConfig struct {
	// Dial opens a connection to the server's HTTP or HTTPS port; with TLS on
	// top for the latter, without HTTP/2.
	Dial      func(context.Context) (net.Conn, error)
	Host      string // host or host:port, for the Host header
	Machine   identity.MachinePrivate
	ServerKey identity.MachinePublic
	Version   uint16 // capability version to announce
}

// Dial connects to a control server: Dial, HTTP upgrade and handshake, within
// ten seconds. A server with another key than ServerKey gives ErrServerKey, a
// refusal of the upgrade an *UpgradeError, a close without answer ErrClosed.
// The early payload, if there is one, is read by the first Read.
func Dial(ctx context.Context, cfg ClientConfig) (*Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, handshakeTime, fmt.Errorf("no handshake within %v", handshakeTime))
	defer cancel()
	hs, msg, err := initiate(cfg.Machine, cfg.ServerKey, cfg.Version)
	if err != nil {
		return nil, err
	}
	conn, err := cfg.Dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("dial %s: %w", cfg.Host, context.Cause(ctx))
		}
		return nil, err
	}
	// The end of ctx makes whatever blocks on conn return.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	c, err := upgrade(conn, cfg, hs, msg)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("noise handshake: %w", context.Cause(ctx))
		}
		return nil, fmt.Errorf("noise handshake: %w", err)
	}
	return c, nil
}

// meter reads up to left bytes of r.
type meter struct {
	r    io.Reader
	left int
}

func (m *meter) Read(p []byte) (int, error) {
	if m.left == 0 {
		return 0, errors.New("answer is too long")
	}
	n, err := m.r.Read(p[:min(len(p), m.left)])
	m.left -= n
	return n, err
}

func upgrade(conn net.Conn, cfg ClientConfig, hs *initiator, msg []byte) (*Conn, error) {
	if strings.ContainsAny(cfg.Host, "\r\n\t /") || cfg.Host == "" {
		return nil, fmt.Errorf("bad host %q", cfg.Host)
	}
	req := "POST " + Path + " HTTP/1.1\r\n" +
		"Host: " + cfg.Host + "\r\n" +
		"Upgrade: " + upgradeToken + "\r\n" +
		"Connection: upgrade\r\n" +
		handshakeHeader + ": " + base64.StdEncoding.EncodeToString(msg) + "\r\n" +
		"Content-Length: 0\r\n\r\n"
	if _, err := io.WriteString(conn, req); err != nil {
		return nil, fmt.Errorf("send upgrade: %w", err)
	}
	limited := &meter{r: conn, left: maxHead}
	in := bufio.NewReaderSize(limited, readAhead)
	resp, err := http.ReadResponse(in, &http.Request{Method: http.MethodPost})
	if err != nil {
		return nil, fmt.Errorf("read answer to upgrade: %w", err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return nil, &UpgradeError{StatusCode: resp.StatusCode, RetryAfter: resp.Header.Get("Retry-After"), Text: clip(text)}
	}
	if got := resp.Header.Get("Upgrade"); got != upgradeToken {
		return nil, fmt.Errorf("server upgraded to %q, not to %s", clip([]byte(got)), upgradeToken)
	}
	answer, err := readResponse(in)
	if err != nil {
		return nil, err
	}
	up, down, err := hs.finish(answer)
	if err != nil {
		return nil, err
	}
	c := newConn(conn, after(in, conn), cfg.ServerKey, cfg.Version, down, up)
	c.wantEarly = true
	return c, nil
}

// readResponse reads the server's handshake message, or the error it sends
// instead.
func readResponse(in io.Reader) ([]byte, error) {
	var msg [responseLen]byte
	if n, err := io.ReadFull(in, msg[:frameHeader]); err != nil {
		if n == 0 && err == io.EOF {
			return nil, ErrClosed
		}
		return nil, fmt.Errorf("read handshake response: %w", noEOF(err))
	}
	n := int(binary.BigEndian.Uint16(msg[1:]))
	switch {
	case msg[0] == typeResponse && n == responseLen-frameHeader:
		if _, err := io.ReadFull(in, msg[frameHeader:]); err != nil {
			return nil, fmt.Errorf("read handshake response: %w", noEOF(err))
		}
		return msg[:], nil
	case msg[0] == typeError && n <= maxFrame-frameHeader:
		text := make([]byte, n)
		got, _ := io.ReadFull(in, text)
		return nil, fmt.Errorf("%w: the server says %q: %w", ErrHandshake, clip(text[:got]), ErrServerKey)
	default:
		return nil, fmt.Errorf("%w: answer of type %d, %d bytes", ErrHandshake, msg[0], n)
	}
}

// after returns what follows HTTP: what was read too far of conn, and the rest.
func after(read *bufio.Reader, conn net.Conn) io.Reader {
	n := read.Buffered()
	if n == 0 {
		return conn
	}
	early, _ := read.Peek(n)
	return io.MultiReader(bytes.NewReader(bytes.Clone(early)), conn)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// AcceptOptions adds to Accept. The zero value is fine.
type AcceptOptions struct {
	// EarlyPayload is JSON to send ahead of the first bytes; nil = none. It is
	// at most 1 MiB.
	EarlyPayload []byte
}

// Accept takes an upgrade at Path: it checks the request, takes the connection
// over, and finishes the handshake with the server's key. If it fails, the
// client has been answered (status 400 for a request that is no proper
// upgrade) and the connection closed. The caller owns the Conn and should look
// at its Version.
func Accept(w http.ResponseWriter, r *http.Request, serverKey identity.MachinePrivate, opts AcceptOptions) (*Conn, error) {
	msg, err := checkUpgrade(r)
	if err == nil && len(opts.EarlyPayload) > maxEarly {
		err = fmt.Errorf("early payload of %d bytes is too long", len(opts.EarlyPayload))
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, fmt.Errorf("noise upgrade: %w", err)
	}
	a, hsErr := respond(serverKey, msg)

	w.Header().Set("Upgrade", upgradeToken)
	w.Header().Set("Connection", "upgrade")
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "upgrade is not possible here", http.StatusInternalServerError)
		return nil, fmt.Errorf("noise upgrade: %w", err)
	}
	var out bytes.Buffer
	out.WriteString("HTTP/1.1 101 Switching Protocols\r\nUpgrade: " + upgradeToken + "\r\nConnection: upgrade\r\n\r\n")
	conn.SetDeadline(time.Now().Add(handshakeTime))
	if hsErr != nil {
		const text = "handshake failed"
		out.WriteByte(typeError)
		out.Write(binary.BigEndian.AppendUint16(nil, uint16(len(text))))
		out.WriteString(text)
		conn.Write(out.Bytes())
		conn.Close()
		return nil, fmt.Errorf("noise upgrade: %w", hsErr)
	}
	out.Write(a.response)

	c := newConn(conn, after(rw.Reader, conn), a.peer, a.version, a.up, a.down)
	if opts.EarlyPayload != nil {
		early := binary.BigEndian.AppendUint32(bytes.Clone(earlyMagic), uint32(len(opts.EarlyPayload)))
		for p := range slices.Chunk(append(early, opts.EarlyPayload...), maxPlain) {
			record, err := c.appendRecord(nil, p)
			if err != nil {
				conn.Close()
				return nil, fmt.Errorf("noise upgrade: %w", err)
			}
			out.Write(record)
		}
	}
	if _, err := conn.Write(out.Bytes()); err != nil {
		conn.Close()
		return nil, fmt.Errorf("noise upgrade: send response: %w", err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("noise upgrade: %w", err)
	}
	return c, nil
}

// checkUpgrade returns the client's handshake message out of a request.
func checkUpgrade(r *http.Request) ([]byte, error) {
	if r.Method != http.MethodPost {
		return nil, errors.New("an upgrade must be a POST")
	}
	if got := r.Header.Get("Upgrade"); got == "" {
		return nil, errors.New("missing Upgrade header")
	} else if !strings.EqualFold(got, upgradeToken) {
		return nil, errors.New("unknown protocol in Upgrade header")
	}
	text := r.Header.Get(handshakeHeader)
	if text == "" {
		return nil, errors.New("missing " + handshakeHeader + " header")
	}
	msg, err := base64.StdEncoding.DecodeString(text)
	if err != nil || checkInitiation(msg) != nil {
		return nil, errors.New("malformed " + handshakeHeader + " header")
	}
	return msg, nil
}
