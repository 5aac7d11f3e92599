package api

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

// operation is what a resource file says of one operation; parameters and
// bodies come from the Go types of its handler.
type operation struct {
	id      string // operationId; the client package has a method for each
	method  string
	path    string
	tag     string
	summary string
	about   string // Markdown
	status  int    // of success; 0 = 200
	request any    // example of the JSON body
	answer  any    // example of the JSON answer
	errors  []int  // beside 400, 401 and 500
	sample  string // a shell command; "" = curl, made from the rest
	public  bool   // needs no API key
}

// capsuleErrors are those of every operation that reaches into a capsule.
var capsuleErrors = []int{http.StatusNotFound, http.StatusConflict, http.StatusBadGateway, http.StatusServiceUnavailable}

// register adds an operation whose body and answer huma decodes and encodes.
func register[I, O any](s *server, o operation, handle func(context.Context, control.Caller, *I) (*O, error)) {
	huma.Register(s.json, o.document(), func(ctx context.Context, in *I) (*O, error) {
		out, err := handle(ctx, callerOf(ctx), in)
		if err != nil {
			return nil, s.toBody(ctx, err)
		}
		return out, nil
	})
}

// checkQuery refuses parameters that the operation does not have: one that is
// misspelt would otherwise change what is done, without a word.
func (s *server) checkQuery(hc huma.Context, next func(huma.Context)) {
	r, w := humachi.Unwrap(hc)
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		s.fail(w, r, nestbox.Errorf(nestbox.CodeInvalid, "the query cannot be read: %w", err))
		return
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		if !slices.ContainsFunc(hc.Operation().Parameters, func(p *huma.Param) bool { return p.In == "query" && p.Name == name }) {
			s.fail(w, r, nestbox.Errorf(nestbox.CodeInvalid, "there is no query parameter %.80q here", name))
			return
		}
	}
	next(hc)
}

// nothing is the answer of operations that answer 204.
type nothing struct{}

// written is an answer that the handler writes itself.
type written struct {
	Body func(huma.Context)
}

// registerRaw adds an operation that reads its body and writes its answer
// itself. An error that it returns is answered, so it may return one only as
// long as it has written nothing.
func registerRaw[I any](s *server, api huma.API, o operation, handle func(http.ResponseWriter, *http.Request, *I) error) *huma.Operation {
	huma.Register(api, o.document(), func(_ context.Context, in *I) (*written, error) {
		return &written{Body: func(hc huma.Context) {
			r, w := humachi.Unwrap(hc)
			if err := handle(w, r, in); err != nil {
				s.fail(w, r, err)
			}
		}}, nil
	})
	return s.documented(o)
}

// documented returns what the document says of an operation, to add to it.
func (s *server) documented(o operation) *huma.Operation {
	item := s.open.OpenAPI().Paths[o.path]
	switch o.method {
	case http.MethodPost:
		return item.Post
	case http.MethodPut:
		return item.Put
	case http.MethodDelete:
		return item.Delete
	case http.MethodHead:
		return item.Head
	default:
		return item.Get
	}
}

// Names of the security schemes in the document.
const (
	schemeKey    = "apiKey"
	schemeBearer = "bearer"
)

func newDocument() huma.Config {
	config := huma.DefaultConfig("Nestbox", "v1")
	config.OpenAPIPath, config.DocsPath, config.SchemasPath = "", "", ""
	config.CreateHooks = nil // no $schema fields
	json := huma.Format{Marshal: huma.DefaultJSONFormat.Marshal, Unmarshal: unmarshalJSON}
	config.Formats = map[string]huma.Format{"application/json": json, "json": json}
	config.Info.Description = "Sandboxes for AI agents: isolated Linux machines with long-lived processes. " +
		"Errors are always `{\"error\":{\"code\",\"message\"}}`. A capsule of another team is 404, like an unknown one."
	config.Info.License = &huma.License{Name: "Apache-2.0", Identifier: "Apache-2.0"}
	config.Servers = []*huma.Server{{URL: "/"}}
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		schemeKey:    {Type: "apiKey", In: "header", Name: apiKeyHeader, Description: "An API key: `wrn_` and 32 hex characters"},
		schemeBearer: {Type: "http", Scheme: "bearer", Description: "The same API key as a bearer token"},
	}
	return config
}

// document turns the operation into huma's form.
func (o operation) document() huma.Operation {
	if o.status == 0 {
		o.status = http.StatusOK
	}
	op := huma.Operation{
		OperationID:     o.id,
		Method:          o.method,
		Path:            o.path,
		Tags:            []string{o.tag},
		Summary:         o.summary,
		Description:     o.about,
		DefaultStatus:   o.status,
		MaxBodyBytes:    -1, // readJSON has its own limits
		BodyReadTimeout: -1,
		Security:        []map[string][]string{{schemeKey: {}}, {schemeBearer: {}}},
		Responses:       map[string]*huma.Response{},
		Extensions: map[string]any{
			"x-codeSamples": []map[string]string{{"lang": "shell", "source": o.shell()}},
		},
	}
	success := &huma.Response{Description: http.StatusText(o.status)}
	if o.answer != nil {
		success.Content = map[string]*huma.MediaType{"application/json": {Example: o.answer}}
	}
	op.Responses[strconv.Itoa(o.status)] = success
	if o.request != nil {
		op.RequestBody = &huma.RequestBody{Content: map[string]*huma.MediaType{"application/json": {Example: o.request}}}
	}
	statuses := append([]int{http.StatusBadRequest, http.StatusInternalServerError}, o.errors...)
	if o.public {
		op.Security = []map[string][]string{}
	} else {
		statuses = append(statuses, http.StatusUnauthorized)
	}
	for _, status := range statuses {
		op.Responses[strconv.Itoa(status)] = errorResponse(status)
	}
	return op
}

// errorResponse documents an error. huma puts the schema that is meant here
// into the document when it meets the first operation.
func errorResponse(status int) *huma.Response {
	return &huma.Response{
		Description: http.StatusText(status),
		Content: map[string]*huma.MediaType{"application/json": {
			Schema:  &huma.Schema{Ref: "#/components/schemas/ErrorBody"},
			Example: errorBody{Detail: exampleErrors[status]},
		}},
	}
}

// exampleErrors has one error for each status that an operation documents.
var exampleErrors = map[int]errorDetail{
	http.StatusBadRequest:                   {Code: "invalid_request", Message: "body.vcpus: expected integer"},
	http.StatusUnauthorized:                 {Code: "unauthorized", Message: "invalid API key"},
	http.StatusForbidden:                    {Code: "forbidden", Message: "port 49983 is reserved"},
	http.StatusNotFound:                     {Code: "not_found", Message: "capsule not found"},
	http.StatusConflict:                     {Code: "invalid_state", Message: "capsule is stopped"},
	http.StatusPreconditionFailed:           {Code: "precondition_failed", Message: "/root/a.txt has changed"},
	http.StatusRequestedRangeNotSatisfiable: {Code: "invalid_request", Message: "there is no such part of /root/a.txt"},
	http.StatusRequestEntityTooLarge:        {Code: "too_large", Message: "file exceeds 100 MB limit"},
	http.StatusUpgradeRequired:              {Code: "invalid_request", Message: "this is a WebSocket"},
	http.StatusTooManyRequests:              {Code: "exhausted", Message: "no more processes can be started"},
	http.StatusInternalServerError:          {Code: "internal_error", Message: "internal error"},
	http.StatusNotImplemented:               {Code: "unsupported", Message: "the capsule has no way out: the host had none when it was made"},
	http.StatusBadGateway:                   {Code: "agent_error", Message: "the capsule's daemon does not answer"},
	http.StatusServiceUnavailable:           {Code: "host_unavailable", Message: "capsule host is not reachable"},
	http.StatusInsufficientStorage:          {Code: "exhausted", Message: "no space left on device"},
}

// samplePath fills in the parameters of a path.
var samplePath = strings.NewReplacer("{id}", "$CAPSULE", "{selector}", "web", "{port}", "8080")

func (o operation) shell() string {
	if o.sample != "" {
		return o.sample
	}
	var b strings.Builder
	b.WriteString("curl")
	if o.method != http.MethodGet {
		b.WriteString(" -X " + o.method)
	}
	if !o.public {
		b.WriteString(` -H "X-API-Key: $NESTBOX_API_KEY"`)
	}
	fmt.Fprintf(&b, ` "$NESTBOX_URL%s"`, samplePath.Replace(o.path))
	if o.request != nil {
		body, err := json.Marshal(o.request)
		if err != nil {
			panic(fmt.Sprintf("example of %s: %v", o.id, err)) // found by every test
		}
		fmt.Fprintf(&b, " \\\n  -H 'Content-Type: application/json' -d '%s'", strings.ReplaceAll(string(body), "'", `'\''`))
	}
	return b.String()
}

// jsonContent documents an answer or a body that no handler type shows.
func (s *server) jsonContent(example any) map[string]*huma.MediaType {
	return map[string]*huma.MediaType{"application/json": {Schema: s.schemas(example)[0], Example: example}}
}

// schemas puts the types of values into the document.
func (s *server) schemas(values ...any) []*huma.Schema {
	var refs []*huma.Schema
	for _, v := range values {
		refs = append(refs, s.open.OpenAPI().Components.Schemas.Schema(reflect.TypeOf(v), true, ""))
	}
	return refs
}

// binaryContent documents a body of plain bytes.
func binaryContent() map[string]*huma.MediaType {
	return map[string]*huma.MediaType{"application/octet-stream": {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}}}
}
