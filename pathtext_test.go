package nestbox_test

import (
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/nestbox/nestbox"
)

func TestPathText(t *testing.T) {
	t.Parallel()
	for path, text := range map[string]string{
		"":                  "",
		"/a/ü/\uFFFD":       "/a/ü/\uFFFD",
		"/caf\xe9":          "/caf\U0010FEE9",
		"/\xff\xfe/a":       "/\U0010FEFF\U0010FEFE/a",
		"/\U0010FE80":       "/\U0010FEF4\U0010FE8F\U0010FEBA\U0010FE80",
		"/\U0010FF00\xf4":   "/\U0010FF00\U0010FEF4",
		"/\xed\xa0\x80":     "/\U0010FEED\U0010FEA0\U0010FE80", // a surrogate
		"/\U0010FE7F\u20ac": "/\U0010FE7F\u20ac",
	} {
		require.Equal(t, text, nestbox.PathText(path))
		require.Equal(t, path, nestbox.PathBytes(text))
	}
	require.Equal(t, "/\U0010FEE9\U0010FEFF", nestbox.TextOfPath("/\U0010FEE9\xff"), "what is text already stays")
}

func TestPathTextIsExact(t *testing.T) {
	t.Parallel()
	pieces := rapid.SliceOf(rapid.OneOf(
		rapid.Map(rapid.Byte(), func(b byte) string { return string([]byte{b}) }),
		rapid.Map(rapid.Rune(), func(r rune) string { return string(r) }),
		rapid.Map(rapid.Int32Range(0x10FE70, 0x10FF10), func(r int32) string { return string(r) }),
	))
	rapid.Check(t, func(t *rapid.T) {
		path := ""
		for _, p := range pieces.Draw(t, "path") {
			path += p
		}
		text := nestbox.PathText(path)
		require.True(t, utf8.ValidString(text))
		require.Equal(t, path, nestbox.PathBytes(text))
		require.Equal(t, text, nestbox.TextOfPath(text))
	})
}
