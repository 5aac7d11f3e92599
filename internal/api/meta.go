package api

import (
	"context"
	_ "embed"
	"net/http"
	"sync"

	"github.com/danielgtaylor/huma/v2"
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

func (s *server) registerMeta() {
	o := operation{
		id: "health", method: http.MethodGet, path: "/health", tag: "Server", public: true,
		summary: "Tell that the server answers", answer: health{Status: "ok", Version: "1.0.0"},
	}
	huma.Register(s.open, o.document(), func(context.Context, *struct{}) (*healthOutput, error) {
		return &healthOutput{Body: health{Status: "ok", Version: s.cfg.Version}}, nil
	})
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
