package portmap

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	// maxDocument bounds an HTTP answer, head and all.
	maxDocument = 256 << 10
	// httpTime bounds one request.
	httpTime = 3 * time.Second
)

// roundTrip makes one HTTP request over a connection of its own: a GET, or a
// POST if there is a SOAP action. It follows no redirection, and nothing of it
// goes on when it returns.
func (c *Client) roundTrip(ctx context.Context, to endpoint, action string, body []byte) (status int, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, httpTime)
	defer cancel()
	nc, err := c.cfg.DialTCP(ctx, "tcp4", to.addr.String())
	if err != nil {
		return 0, nil, err
	}
	defer nc.Close()
	// The end of ctx shows as a time-out of the socket.
	defer context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })()

	head := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", to.path, to.addr)
	method := http.MethodGet
	if action != "" {
		method = http.MethodPost
		head = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n"+
			"Content-Type: text/xml; charset=\"utf-8\"\r\nSOAPAction: \"%s\"\r\nContent-Length: %d\r\n\r\n",
			to.path, to.addr, action, len(body))
	}
	// One write: some gateways read a request only once.
	if _, err := nc.Write(append([]byte(head), body...)); err != nil {
		return 0, nil, cause(ctx, err)
	}
	limited := &io.LimitedReader{R: nc, N: maxDocument}
	resp, err := http.ReadResponse(bufio.NewReader(limited), &http.Request{Method: method})
	if err != nil {
		return 0, nil, tooLong(limited, cause(ctx, err))
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	if err == nil && limited.N == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, nil, tooLong(limited, cause(ctx, err))
	}
	return resp.StatusCode, answer, nil
}

func tooLong(r *io.LimitedReader, err error) error {
	if r.N == 0 {
		return errors.New("the answer is too long")
	}
	return err
}
