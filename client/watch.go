package client

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"time"

	"github.com/coder/websocket"

	"github.com/nestbox/nestbox"
)

// WatchOptions say what of a path is watched.
type WatchOptions struct {
	// Recursive watches what is below the directories in it as well, also in those
	// that are made later.
	Recursive bool
}

// Watch tells what happens to files, across lost connections and restarts of the
// server: what may have been missed meanwhile is a nestbox.FileOverflow. It is
// used by one goroutine at a time.
type Watch struct {
	files *Files
	query url.Values
	path  string
	conn  *streamConn // nil while not connected
	lost  *pauses     // non-nil while trying to connect again
	ended bool
}

// Watch watches a file, or a directory and what is in it, from when it returns.
// The watch must be closed. CodeNotFound: nothing is there. CodeUnsupported: the
// capsule was made by a version that cannot watch. CodeExhausted: it watches too much already.
func (f *Files) Watch(ctx context.Context, path string, opts WatchOptions) (*Watch, error) {
	w := &Watch{files: f, path: path, query: pathQuery(path)}
	if opts.Recursive {
		w.query.Set("recursive", "true")
	}
	wait := newPauses(f.c.retryFor)
	for {
		err := w.connect(ctx)
		if err == nil {
			return w, nil
		}
		if nestbox.CodeOf(err) != nestbox.CodeUnavailable || !wait.next(ctx) {
			return nil, firstError(ctx, err)
		}
	}
}

// Next returns the next event, waiting for it. io.EOF: what was watched is gone; its
// removal or renaming was the last event. Any other error means that nothing is
// watched any more, or that ctx ended; after the latter, Next may be called again.
func (w *Watch) Next(ctx context.Context) (nestbox.FileEvent, error) {
	for {
		if w.ended {
			return nestbox.FileEvent{}, io.EOF
		}
		if w.conn == nil {
			if err := w.connect(ctx); err != nil {
				if err := w.pause(ctx, err); err != nil {
					return nestbox.FileEvent{}, err
				}
				continue
			}
			return nestbox.FileEvent{Type: nestbox.FileOverflow, Path: w.path}, nil
		}
		frame, err := w.receive(ctx)
		switch {
		case err == nil:
			w.lost = nil
			return frame.domain(), nil
		case websocket.CloseStatus(err) == websocket.StatusNormalClosure:
			w.ended = true
			w.hangUp()
			continue
		}
		if time.Since(w.conn.born) > settled {
			w.lost = nil // it did work; this is another failure
		}
		w.hangUp()
		if err := w.pause(ctx, err); err != nil {
			return nestbox.FileEvent{}, err
		}
	}
}

// pause waits before the next attempt to connect, or returns the error to give up with.
func (w *Watch) pause(ctx context.Context, err error) error {
	c := w.files.c
	if !c.mayComeBack(ctx, w.files.capsule, err) {
		return firstError(ctx, err)
	}
	if w.lost == nil {
		w.lost = newPauses(c.patience(err))
	}
	if !w.lost.next(ctx) {
		return firstError(ctx, err)
	}
	return nil
}

// Close ends the watch.
func (w *Watch) Close() error {
	w.ended = true
	w.hangUp()
	return nil
}

func (w *Watch) hangUp() {
	if w.conn != nil {
		w.conn.close()
		w.conn = nil
	}
}

// connect returns once the capsule watches.
func (w *Watch) connect(ctx context.Context) error {
	conn, err := w.files.c.dial(ctx, capsulePath(w.files.capsule, "/files/watch"), w.query)
	if err != nil {
		return err
	}
	w.conn = conn
	if _, err := w.receive(ctx); err != nil {
		w.hangUp()
		return err
	}
	return nil
}

// watchFrame is one message of a watch.
type watchFrame struct {
	Type      string `json:"type"`
	Path      string `json:"path"`
	To        string `json:"to"`
	Directory bool   `json:"directory"`
}

func (f watchFrame) domain() nestbox.FileEvent {
	return nestbox.FileEvent{Type: nestbox.FileEventType(f.Type), Path: nestbox.PathBytes(f.Path), To: nestbox.PathBytes(f.To), Directory: f.Directory}
}

// receive returns the next message that is no error.
func (w *Watch) receive(ctx context.Context) (watchFrame, error) {
	msg, err := w.conn.receive(ctx)
	if err != nil {
		return watchFrame{}, err
	}
	var f watchFrame
	if err := json.Unmarshal(msg, &f); err != nil {
		return f, noFrame(err)
	}
	if f.Type != frameError {
		return f, nil
	}
	var failed frame
	if err := json.Unmarshal(msg, &failed); err != nil {
		return f, noFrame(err)
	}
	return f, newError(0, failed.Code, failed.text())
}
