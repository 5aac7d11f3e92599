package api

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"
)

// BenchmarkOutput measures how fast recorded output leaves by each of its ways,
// over loopback and with a client that throws it away.
func BenchmarkOutput(b *testing.B) {
	const piece, pieces = 256 << 10, 128
	r := newRig(b)
	r.start("web")
	line := strings.Repeat("0123456789abcdef 0123456789abcdef \"quoted\" €\n", piece/40)[:piece]
	r.script("web", func(p *scripted) {
		for range pieces {
			p.write("stdout", line)
		}
		p.closed()
	})
	for name, header := range map[string][]string{"plain": nil, "events": {"Accept", "text/event-stream"}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(piece * pieces)
			for b.Loop() {
				res, err := r.server.Client().Do(r.newRequest(http.MethodGet, webLogs, nil, header...))
				require.NoError(b, err)
				_, err = io.Copy(io.Discard, res.Body)
				require.NoError(b, err)
				require.NoError(b, res.Body.Close())
			}
		})
	}
	for _, encoding := range []string{"utf-8", "base64"} {
		b.Run("socket-"+encoding, func(b *testing.B) {
			b.SetBytes(piece * pieces)
			for b.Loop() {
				p := r.dial(webStream + "?encoding=" + encoding)
				p.conn.SetReadLimit(1 << 20)
				for {
					_, msg, err := p.conn.Reader(b.Context())
					if websocket.CloseStatus(err) == websocket.StatusNormalClosure {
						break
					}
					require.NoError(b, err)
					_, err = io.Copy(io.Discard, msg)
					require.NoError(b, err)
				}
			}
		})
	}
}
