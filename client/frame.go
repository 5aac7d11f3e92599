package client

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/nestbox/nestbox"
)

// Types of frames.
const (
	frameStart  = "start"
	frameStdout = "stdout"
	frameStderr = "stderr"
	framePty    = "pty"
	frameGap    = "gap"
	frameExit   = "exit"
	frameClosed = "output_closed"
	frameError  = "error"
)

// frame is one message of an output stream.
type frame struct {
	Type     string          `json:"type"`
	ID       wireID          `json:"id"`
	PID      int             `json:"pid"`
	Tag      string          `json:"tag"`
	RawData  json.RawMessage `json:"data"` // base64 of output; text of an error
	Data     []byte          `json:"-"`    // RawData of output, decoded
	Offset   int64           `json:"offset"`
	At       time.Time       `json:"at"` // zero if it was not asked for
	From     int64           `json:"from"`
	To       int64           `json:"to"`
	ExitCode int             `json:"exit_code"`
	Signal   string          `json:"signal"`
	Reason   string          `json:"reason"`
	Code     string          `json:"code"`
	Detail   nestbox.Detail  `json:"detail"` // of an error
}

// text returns the data of an error frame.
func (f frame) text() string {
	var s string
	if err := json.Unmarshal(f.RawData, &s); err != nil || s == "" {
		return "the stream failed"
	}
	return s
}

// parseFrame reads a frame. Data is decoded into buf, which is made larger if
// need be and returned.
func parseFrame(msg, buf []byte) (frame, []byte, error) {
	f, text, ok := parseAroundData(msg)
	if !ok {
		f = frame{}
		if err := json.Unmarshal(msg, &f); err != nil {
			return f, buf, err
		}
		if !f.isOutput() {
			return f, buf, nil
		}
		var s string
		if err := json.Unmarshal(f.RawData, &s); err != nil {
			return f, buf, err
		}
		text = []byte(s)
	}
	if need := base64.StdEncoding.DecodedLen(len(text)); cap(buf) < need {
		buf = make([]byte, need)
	}
	n, err := base64.StdEncoding.Decode(buf[:cap(buf)], text)
	f.Data = buf[:n]
	return f, buf, err
}

func (f frame) isOutput() bool {
	return f.Type == frameStdout || f.Type == frameStderr || f.Type == framePty
}

// parseAroundData reads a frame of output without having its data go through
// the JSON decoder, which takes several times as long as everything else. That
// is sound because a quote inside of a JSON string is escaped, so that the key
// cannot be part of one, and because base64 has neither quotes nor escapes.
// Anything else is left to the decoder (ok = false).
func parseAroundData(msg []byte) (f frame, text []byte, ok bool) {
	const key = `"data":"`
	start := bytes.Index(msg, []byte(key)) + len(key)
	if start < len(key) {
		return f, nil, false
	}
	length := bytes.IndexByte(msg[start:], '"')
	if length < 0 {
		return f, nil, false
	}
	text = msg[start : start+length]
	if bytes.IndexByte(text, '\\') >= 0 {
		return f, nil, false
	}
	around := make([]byte, 0, 256)
	around = append(append(around, msg[:start]...), msg[start+length:]...)
	err := json.Unmarshal(around, &f)
	return f, text, err == nil && f.isOutput()
}

// Limits of a connection. A frame carries at most some hundred KiB of output.
const (
	maxFrame   = 16 << 20
	pingEvery  = 20 * time.Second
	pongWithin = 20 * time.Second
)

// streamConn is one WebSocket connection that frames come from. One goroutine
// reads; another one sees to it that a peer that is gone is noticed.
type streamConn struct {
	ws   *websocket.Conn
	born time.Time
	msg  bytes.Buffer
	data []byte

	reading atomic.Bool   // somebody waits for a frame
	frames  atomic.Uint64 // how many came
	stop    context.CancelFunc
	pinger  sync.WaitGroup
}

// socket makes a WebSocket, with the key in its handshake.
func (c *Client) socket(ctx context.Context, path string, q url.Values) (*websocket.Conn, error) {
	header := http.Header{}
	c.setIdentity(header)
	ws, res, err := websocket.Dial(ctx, c.url(path, q), &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: header})
	if err != nil {
		if ctx.Err() != nil {
			return nil, contextError(ctx)
		}
		if res != nil && res.StatusCode != http.StatusSwitchingProtocols {
			return nil, responseError(res)
		}
		return nil, c.connectionError(err, false)
	}
	return ws, nil
}

// dial connects once.
func (c *Client) dial(ctx context.Context, path string, q url.Values) (*streamConn, error) {
	ws, err := c.socket(ctx, path, q)
	if err != nil {
		return nil, err
	}
	ws.SetReadLimit(maxFrame)
	pingCtx, stop := context.WithCancel(context.Background())
	conn := &streamConn{ws: ws, born: time.Now(), stop: stop}
	conn.pinger.Go(func() { conn.keepAlive(pingCtx) })
	return conn, nil
}

// read returns the next frame, whose Data is valid until the following read.
func (s *streamConn) read(ctx context.Context) (frame, error) {
	msg, err := s.receive(ctx)
	if err != nil {
		return frame{}, err
	}
	var f frame
	if f, s.data, err = parseFrame(msg, s.data); err != nil {
		return f, noFrame(err)
	}
	return f, nil
}

func noFrame(err error) error {
	return &Error{Err: nestbox.Errorf(nestbox.CodeUnavailable, "the stream carried something that is no frame: %w", err)}
}

// receive returns the next message, which is valid until the following one.
func (s *streamConn) receive(ctx context.Context) ([]byte, error) {
	s.reading.Store(true)
	defer s.reading.Store(false)
	_, r, err := s.ws.Reader(ctx)
	if err == nil {
		s.msg.Reset()
		_, err = s.msg.ReadFrom(r)
	}
	if err != nil {
		return nil, &Error{Err: nestbox.Errorf(nestbox.CodeUnavailable, "the stream was cut off: %w", err)}
	}
	s.frames.Add(1)
	return s.msg.Bytes(), nil
}

// write sends a message.
func (s *streamConn) write(ctx context.Context, v any) error {
	msg, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.ws.Write(ctx, websocket.MessageText, msg)
}

// aliveMessage is of no type that means anything to the server: it shows it
// that this side lives.
var aliveMessage = []byte(`{"type":"alive"}`)

// keepAlive pings while somebody waits for a frame, and cuts the connection if
// neither an answer nor a frame comes: a peer that vanished without a word
// would be waited for for ever. While nobody waits, because the consumer of
// the output is slow, no pong can be seen by either side; then it shows life.
func (s *streamConn) keepAlive(ctx context.Context) {
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		before := s.frames.Load()
		within, cancel := context.WithTimeout(ctx, pongWithin)
		var err error
		if s.reading.Load() {
			err = s.ws.Ping(within)
		} else {
			err = s.ws.Write(within, websocket.MessageText, aliveMessage)
		}
		cancel()
		if err != nil && ctx.Err() == nil && s.reading.Load() && s.frames.Load() == before {
			_ = s.ws.CloseNow() // the reader gets the error
		}
	}
}

func (s *streamConn) close() {
	s.stop()
	_ = s.ws.CloseNow() // the stream is over, or broken: nothing is left to say
	s.pinger.Wait()
}
