package api

import (
	"context"
	_ "embed"
	"errors"
	"net/http"
	"sync"

	"github.com/danielgtaylor/huma/v2"

	"github.com/nestbox/nestbox"
)

//go:generate go test . -run ^TestOpenAPI$ -update

// openAPI is the document as it was generated from the Go types; a test
// compares it with them. To write it anew:
//
//	go generate ./internal/api
//
//go:embed openapi.yaml
var openAPI []byte

//go:embed docs.html
var docsTemplate string

type health struct {
	Status  string `json:"status" enum:"ok"`
	Version string `json:"version"`
}

type healthOutput struct {
	Body health
}

type ready struct {
	Status string `json:"status" enum:"ready"`
}

type readyOutput struct {
	Body ready
}

func (s *server) registerReady() {
	o := operation{
		id: "ready", method: http.MethodGet, path: "/ready", tag: "Server", public: true,
		summary: "Tell whether the server can do its work",
		about:   "503, with what is wrong, if the database or the host does not answer; `/health` answers all the same.",
		answer:  ready{Status: "ready"}, errors: []int{http.StatusServiceUnavailable},
	}
	huma.Register(s.open, o.document(), func(ctx context.Context, _ *struct{}) (*readyOutput, error) {
		fresh, err := s.control.Ready.Look(ctx)
		if err == nil {
			return &readyOutput{Body: ready{Status: "ready"}}, nil
		}
		return nil, s.toBody(ctx, &errorBody{
			status: http.StatusServiceUnavailable,
			Detail: errorDetail{Code: failures[nestbox.CodeUnavailable].code, Message: "not ready: " + err.Error()},
			cause:  errors.Unwrap(err),
			logged: !fresh, // anybody may ask, and as often as they like
		})
	})
}

func (s *server) registerMeta() {
	o := operation{
		id: "health", method: http.MethodGet, path: "/health", tag: "Server", public: true,
		summary: "Tell that the server answers", answer: health{Status: "ok", Version: "1.0.0"},
	}
	huma.Register(s.open, o.document(), func(context.Context, *struct{}) (*healthOutput, error) {
		return &healthOutput{Body: health{Status: "ok", Version: s.cfg.Version}}, nil
	})
	s.registerReady()
	spec := registerRaw(s, s.open, operation{
		id: "getOpenAPI", method: http.MethodGet, path: "/openapi.yaml", tag: "Server", public: true,
		summary: "Get this document",
	}, func(w http.ResponseWriter, _ *http.Request, _ *struct{}) error {
		w.Header().Set("Content-Type", "application/openapi+yaml")
		_, _ = w.Write(openAPI) // the client may be gone
		return nil
	})
	spec.Responses["200"].Content = map[string]*huma.MediaType{"application/openapi+yaml": {Schema: &huma.Schema{Type: huma.TypeString}}}
	page := sync.OnceValues(s.docsPage)
	docs := registerRaw(s, s.open, operation{
		id: "getDocs", method: http.MethodGet, path: "/docs", tag: "Server", public: true,
		summary: "Read this document in a browser",
	}, func(w http.ResponseWriter, _ *http.Request, _ *struct{}) error {
		html, err := page()
		if err != nil {
			return err
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
		_, _ = w.Write(html) // the client may be gone
		return nil
	})
	docs.Responses["200"].Content = map[string]*huma.MediaType{"text/html": {Schema: &huma.Schema{Type: huma.TypeString}}}
}
