package egress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/nestbox/nestbox"
)

// Client asks the Service of a directory. It is safe for concurrent use.
type Client struct{ http http.Client }

// NewClient returns the Client of a directory. It does no I/O.
func NewClient(dir string) *Client {
	path := filepath.Join(dir, socketFile)
	return &Client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
		MaxIdleConns: 4, IdleConnTimeout: 30 * time.Second,
	}}}
}

// Close closes connections that are kept.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// clientIn bounds one call; opening a Gateway takes milliseconds.
const clientIn = 10 * time.Second

// Put is Service.Put. It is repeated until the Service answers, or ctx ends:
// CodeUnavailable.
func (c *Client) Put(ctx context.Context, id, namespace string, policy nestbox.NetworkPolicy) error {
	return c.call(ctx, http.MethodPut, id, capsuleState{Namespace: namespace, Policy: policy}, nil)
}

// Remove is Service.Remove.
func (c *Client) Remove(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, id, nil, nil)
}

// Look is Service.Look.
func (c *Client) Look(ctx context.Context, id string) (report nestbox.NetworkReport, err error) {
	return report, c.call(ctx, http.MethodGet, id, nil, &report)
}

// again is how soon a Service that did not answer is asked again: it may be about to
// come back.
const again = 20 * time.Millisecond

func (c *Client) call(ctx context.Context, method, id string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, clientIn)
	defer cancel()
	text, err := json.Marshal(in)
	if err != nil {
		return err
	}
	for {
		err := c.once(ctx, method, id, text, out)
		if code := nestbox.CodeOf(err); code != nestbox.CodeUnavailable {
			return err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return err
		}
	}
}

func (c *Client) once(ctx context.Context, method, id string, text []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://egress/capsules/"+id, bytes.NewReader(text))
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return &nestbox.Error{Code: nestbox.CodeUnavailable, Message: "the egress process does not answer", Err: err}
	}
	defer func() { _ = res.Body.Close() }()
	body := json.NewDecoder(io.LimitReader(res.Body, maxState))
	if res.StatusCode != http.StatusOK {
		var e wireError
		if err := body.Decode(&e); err != nil {
			return err
		}
		return &nestbox.Error{Code: e.Code, Message: e.Message}
	}
	if out == nil {
		return nil
	}
	return body.Decode(out)
}

// awaitEnd returns when the Service that answers now, if one does, has ended. One
// with other settings is told to end.
func (c *Client) awaitEnd(ctx context.Context, want string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://egress/alive", nil)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	if res.Header.Get(settingsHeader) != want {
		err = c.end(ctx)
	}
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
	}
	return errors.Join(err, res.Body.Close())
}

func (c *Client) end(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://egress/end", nil)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// Keep has a Service of the directory of c run until ctx ends, whoever started the one
// that does, unless that lifts other ranges. command makes one, which must not end
// with this process: a session and output of its own. When ctx ends the Service goes on
// as long as there are capsules.
func (c *Client) Keep(ctx context.Context, log *slog.Logger, lifted []netip.Prefix, command func() *exec.Cmd) {
	pause := again
	for ctx.Err() == nil {
		began := time.Now()
		if c.awaitEnd(ctx, settings(lifted)) == nil || time.Since(began) > time.Second {
			pause = again // it did run
		}
		if ctx.Err() != nil {
			return
		}
		cmd := command()
		if err := cmd.Start(); err != nil {
			log.Error("starting the egress process; nothing gets out of capsules", "error", err)
		} else {
			log.Info("started the egress process", "pid", cmd.Process.Pid)
			go func() { _ = cmd.Wait() }() // it is no zombie, while we are its parent
		}
		select {
		case <-time.After(pause): // until it listens
		case <-ctx.Done():
		}
		pause = min(2*pause, time.Second)
	}
}
