package api

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"io"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/nestbox/nestbox/internal/spool"
)

// jsonWriter writes an answer as it goes, so that what is large is not collected
// once more for it. Its first error stays, and end returns it.
type jsonWriter struct {
	w   *bufio.Writer
	err error
}

// beginJSON begins an answer.
func beginJSON(hc huma.Context, status int) *jsonWriter {
	hc.SetHeader("Content-Type", "application/json")
	hc.SetStatus(status)
	return &jsonWriter{w: bufio.NewWriterSize(hc.BodyWriter(), 32<<10)}
}

func (j *jsonWriter) end() error {
	j.text("\n")
	if j.err == nil {
		j.err = j.w.Flush()
	}
	return j.err
}

func (j *jsonWriter) text(s string) {
	if j.err == nil {
		_, j.err = j.w.WriteString(s)
	}
}

// value writes something that is small.
func (j *jsonWriter) value(v any) {
	if j.err != nil {
		return
	}
	text, err := json.Marshal(v)
	if err != nil {
		j.err = err
		return
	}
	_, j.err = j.w.Write(text)
}

// member is a string of an object that is too large to be one.
type member struct {
	name  string
	value *spool.Spool
}

// object writes v, a struct, with members in place of its fields of these names,
// which must be omitted if they are empty. All are base64 if one is not UTF-8.
func (j *jsonWriter) object(v any, members ...member) {
	head, err := json.Marshal(v)
	if err != nil || j.err != nil {
		j.err = err
		return
	}
	binary := false
	for _, m := range members {
		binary = binary || !m.value.UTF8()
	}
	_, j.err = j.w.Write(head[:len(head)-1])
	for _, m := range members {
		j.text(`,"` + m.name + `":"`)
		if j.err == nil {
			j.err = copyString(j.w, m.value.Reader(), binary)
		}
		j.text(`"`)
	}
	j.text("}")
}

// copyString writes the inside of a JSON string.
func copyString(w io.Writer, r io.Reader, binary bool) error {
	if binary {
		e := base64.NewEncoder(base64.StdEncoding, w)
		if _, err := io.Copy(e, r); err != nil {
			return err
		}
		return e.Close()
	}
	buf := make([]byte, 16<<10)
	var quoted []byte
	have := 0
	for {
		n, err := r.Read(buf[have:])
		have += n
		whole := have
		for whole > 0 && err == nil && !utf8.FullRune(buf[lastRune(buf[:whole]):whole]) {
			whole = lastRune(buf[:whole])
		}
		quoted, quoteErr := jsontext.AppendQuote(quoted[:0], buf[:whole])
		if quoteErr != nil {
			return quoteErr
		}
		if _, writeErr := w.Write(quoted[1 : len(quoted)-1]); writeErr != nil {
			return writeErr
		}
		have = copy(buf, buf[whole:have])
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// lastRune returns where the last rune of b begins.
func lastRune(b []byte) int {
	for i := len(b) - 1; i > 0 && i > len(b)-utf8.UTFMax; i-- {
		if utf8.RuneStart(b[i]) {
			return i
		}
	}
	return max(0, len(b)-1)
}

// array writes an object that has a list under a name.
func array[T any](j *jsonWriter, name string, n int, element func(int) T) {
	j.text("{")
	list(j, name, n, element)
	j.text("}")
}

// list writes a list under a name, one element after another.
func list[T any](j *jsonWriter, name string, n int, element func(int) T) {
	j.text(`"` + name + `":[`)
	for i := range n {
		if i > 0 {
			j.text(",")
		}
		j.value(element(i))
	}
	j.text("]")
}
