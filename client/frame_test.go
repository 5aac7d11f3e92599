package client

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

func outputMessage(data []byte) []byte {
	msg, err := json.Marshal(map[string]any{
		"type": "stdout", "data": base64.StdEncoding.EncodeToString(data), "offset": 7, "end": 7 + len(data),
	})
	if err != nil {
		panic(err)
	}
	return msg
}

// FuzzParseFrame wants no panic, whatever comes, and every byte of output back.
func FuzzParseFrame(f *testing.F) {
	f.Add([]byte(`{"type":"stdout","data":"aGVsbG8=","offset":3}`), []byte("hello"))
	f.Add([]byte(`{"type":"error","data":"text","code":"not_found"}`), []byte{0xff, 0})
	f.Add([]byte(`{"type":"stderr","data":null}`), []byte{})
	f.Add([]byte(`{"type":"stdout","data":{"a":[1]}}`), []byte{})
	f.Add([]byte(`{"type":"stdout","data":"a\/=="}`), []byte{})
	f.Add([]byte(`{"tag":"\"data\":\"","type":"stdout","data":"aGVsbG8="}`), []byte{})
	f.Fuzz(func(t *testing.T, msg, data []byte) {
		parsed, buf, err := parseFrame(msg, nil)
		if err == nil {
			_ = parsed.text()
		}
		parsed, _, err = parseFrame(outputMessage(data), buf)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, parsed.Data))
		require.EqualValues(t, 7, parsed.Offset)
	})
}

func BenchmarkParseFrame(b *testing.B) {
	data := bytes.Repeat([]byte("some output\n"), 32<<10/12)
	msg := outputMessage(data)
	var buf []byte
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		_, next, err := parseFrame(msg, buf)
		if err != nil {
			b.Fatal(err)
		}
		buf = next
	}
}
