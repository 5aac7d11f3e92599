package api

import (
	"bytes"
	"cmp"
	"encoding/json"
	"html/template"
	"maps"
	"slices"

	"github.com/danielgtaylor/huma/v2"
)

// docsPage renders the document as one page that loads nothing else.
func (s *server) docsPage() ([]byte, error) {
	tmpl, err := template.New("docs").Parse(docsTemplate)
	if err != nil {
		return nil, err
	}
	var page bytes.Buffer
	err = tmpl.Execute(&page, map[string]any{
		"Title":  s.open.OpenAPI().Info.Title,
		"About":  s.open.OpenAPI().Info.Description,
		"Groups": s.docsGroups(),
	})
	return page.Bytes(), err
}

type docsGroup struct {
	Name       string
	Operations []docsOperation
}

type docsOperation struct {
	*huma.Operation
	Sample    string
	Responses []docsResponse
}

type docsResponse struct {
	Status, Description, Example string
}

// docsGroups returns the operations by tag, in the order of their paths.
func (s *server) docsGroups() []docsGroup {
	byTag := map[string][]docsOperation{}
	for _, op := range s.operations() {
		byTag[op.Tags[0]] = append(byTag[op.Tags[0]], docsOperation{Operation: op, Sample: sampleOf(op), Responses: responsesOf(op)})
	}
	var groups []docsGroup
	for _, tag := range slices.Sorted(maps.Keys(byTag)) {
		groups = append(groups, docsGroup{tag, byTag[tag]})
	}
	return groups
}

// operations returns all that is documented, sorted by path and method.
func (s *server) operations() []*huma.Operation {
	var all []*huma.Operation
	for _, item := range s.open.OpenAPI().Paths {
		for _, op := range []*huma.Operation{item.Get, item.Head, item.Put, item.Post, item.Delete} {
			if op != nil {
				all = append(all, op)
			}
		}
	}
	slices.SortFunc(all, func(a, b *huma.Operation) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Method, b.Method))
	})
	return all
}

func sampleOf(op *huma.Operation) string {
	samples, _ := op.Extensions["x-codeSamples"].([]map[string]string)
	if len(samples) == 0 {
		return ""
	}
	return samples[0]["source"]
}

func responsesOf(op *huma.Operation) []docsResponse {
	var out []docsResponse
	for _, status := range slices.Sorted(maps.Keys(op.Responses)) {
		res := op.Responses[status]
		r := docsResponse{Status: status, Description: res.Description}
		if content := res.Content["application/json"]; content != nil && content.Example != nil {
			if text, err := json.MarshalIndent(content.Example, "", "  "); err == nil {
				r.Example = string(text)
			}
		}
		out = append(out, r)
	}
	return out
}
