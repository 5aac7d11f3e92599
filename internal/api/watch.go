package api

import (
	"context"
	"errors"
	"io"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
	"github.com/nestbox/nestbox/internal/guest"
)

type watchInput struct {
	CapsulePath
	Path      string `query:"path" required:"true" doc:"Absolute; a file or a directory" example:"/root"`
	Recursive bool   `query:"recursive" doc:"Also what is below the directories in it, and in those that are made later"`
}

// The frames of a watch.
type (
	watchFrame struct {
		Type string `json:"type" enum:"watch" doc:"The first message of a WebSocket: changes are seen from now on"`
		Path string `json:"path"`
	}
	fileEventFrame struct {
		Type      string `json:"type" enum:"create,write,remove,rename,chmod,overflow"`
		Path      string `json:"path" doc:"Below the path that is watched, as that was asked for; of an overflow it is that path"`
		To        string `json:"to,omitempty" doc:"Of a rename: the new path, if it is watched too"`
		Directory bool   `json:"directory,omitempty" doc:"It is a directory"`
	}
)

func toFileEventFrame(e nestbox.FileEvent) fileEventFrame {
	return fileEventFrame{string(e.Type), e.Path, e.To, e.Directory}
}

func (s *server) registerWatch() {
	op := registerRaw(s, s.open, operation{
		id: "watchFiles", method: http.MethodGet, path: "/v1/capsules/{id}/files/watch", tag: "Files",
		summary: "Watch files",
		about: "As Server-Sent Events, or over a WebSocket if the request is an upgrade. Whoever changes files is seen: programs in the capsule and this API. " +
			"When the answer's header (or the WebSocket's first message, `watch`) has come, changes are seen.\n\n" +
			"- `create`: it is new, or was moved here from where nothing is watched. What is in a directory when it comes is told too.\n" +
			"- `write`: its content was changed. Several writes that nobody has read of yet are told as one.\n" +
			"- `remove`: it is gone.\n" +
			"- `rename`: it is now `to`, with all that is in it, or without `to` where nothing is watched. Something that was at `to` is gone.\n" +
			"- `chmod`: its mode, owner or times were changed.\n" +
			"- `overflow`: more happened than is kept for a client that is slow (8,192 events). List the files again.\n\n" +
			"Symlinks below the path are not followed. Of a file it is the name that is watched: one that takes its place is a `create`. When the path itself is removed or renamed, " +
			"that is told and the stream ends; nothing tells of directories above it. The stream has no time limit. An `error` {data, code} may be its last message.\n\n" +
			"501 `unsupported`: the capsule was made by a version that cannot watch. 429 `exhausted`: more than 64 watches, or 65,536 directories in all of them.",
		errors: append([]int{http.StatusTooManyRequests, http.StatusRequestEntityTooLarge, http.StatusNotImplemented}, capsuleErrors...),
		sample: `curl -N -H "X-API-Key: $NESTBOX_API_KEY" "$NESTBOX_URL/v1/capsules/$CAPSULE/files/watch?path=/root&recursive=true"`,
	}, s.watchFiles)
	s.describeSocket(op, []any{watchFrame{}, fileEventFrame{}, errorFrame{}})
	op.Responses["101"] = &huma.Response{Description: http.StatusText(http.StatusSwitchingProtocols)}
	op.Responses["200"].Content = map[string]*huma.MediaType{"text/event-stream": {
		Schema:  &huma.Schema{Type: huma.TypeString},
		Example: "data: {\"type\":\"create\",\"path\":\"/root/src\",\"directory\":true}\n\ndata: {\"type\":\"rename\",\"path\":\"/root/a\",\"to\":\"/root/src/a\"}\n\n",
	}}
}

// watchFiles serves both kinds of streams. A WebSocket may bring its key later.
func (s *server) watchFiles(w http.ResponseWriter, r *http.Request, in *watchInput) error {
	if hasToken(r.Header, "Upgrade", "websocket") {
		return s.watchSocket(w, r, in)
	}
	s.authenticate(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := s.watchEvents(w, r, in); err != nil {
			s.fail(w, r, err)
		}
	})).ServeHTTP(w, r)
	return nil
}

func (s *server) watch(ctx context.Context, caller control.Caller, in *watchInput) (guest.FileWatch, error) {
	files, err := s.files(ctx, caller, in.ID, in.Path)
	if err != nil {
		return nil, err
	}
	return files.Watch(ctx, in.Path, in.Recursive)
}

func (s *server) watchEvents(w http.ResponseWriter, r *http.Request, in *watchInput) error {
	watch, err := s.watch(r.Context(), callerOf(r.Context()), in)
	if err != nil {
		return err
	}
	defer func() { _ = watch.Close() }()
	out := beginEvents(w)
	stop := out.keepAlive(s.cfg.EventInterval)
	defer stop()
	for {
		events, err := watch.Next(r.Context())
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = out.data(toFileEventFrames(events)...)
		} else {
			body := s.toBody(r.Context(), err)
			_ = out.data(errorFrame{"error", body.Detail.Message, body.Detail.Code, body.Detail.Detail}) // the client may be gone
		}
		if err != nil {
			s.abort(r, "a watch broke off", err)
		}
	}
}

func toFileEventFrames(events []nestbox.FileEvent) []any {
	frames := make([]any, len(events))
	for i, e := range events {
		frames[i] = toFileEventFrame(e)
	}
	return frames
}

func (s *server) watchSocket(w http.ResponseWriter, r *http.Request, in *watchInput) error {
	if err := checkStream(r, in.ID); err != nil {
		return err
	}
	if err := nestbox.ValidatePath(in.Path); err != nil {
		return err
	}
	k, caller := s.accept(w, r)
	if k == nil {
		return nil
	}
	watch, err := s.watch(k.ctx, caller, in)
	if err != nil {
		k.fail(err)
		return nil
	}
	defer func() { _ = watch.Close() }()
	k.wg.Go(k.discard)
	k.end(k.tellOf(watch, in.Path))
	return nil
}

// tellOf sends what a watch tells, to its end.
func (k *socket) tellOf(watch guest.FileWatch, path string) error {
	if err := k.send(watchFrame{"watch", path}); err != nil {
		return err
	}
	for {
		events, err := watch.Next(k.ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, frame := range toFileEventFrames(events) {
			if err := k.send(frame); err != nil {
				return err
			}
		}
	}
}
