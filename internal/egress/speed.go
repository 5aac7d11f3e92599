package egress

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/nestbox/nestbox"
)

// speed limits what a capsule sends and receives, each way by itself.
type speed struct{ sent, received *rate.Limiter }

// piece is how many bytes are copied between two looks at the limit, which therefore may
// be exceeded by as much.
const piece = 64 << 10

func newSpeed(p nestbox.NetworkPolicy) speed {
	s := speed{rate.NewLimiter(rate.Inf, maxDatagram), rate.NewLimiter(rate.Inf, maxDatagram)}
	s.set(p)
	return s
}

// set is for flows that go on, too.
func (s speed) set(p nestbox.NetworkPolicy) {
	limit := rate.Inf
	if p.EgressMbps > 0 {
		limit = rate.Limit(float64(p.EgressMbps) * 1e6 / 8)
	}
	s.sent.SetLimit(limit)
	s.received.SetLimit(limit)
}

// copyTo copies until src ends, which it hands on, or ctx does. It adds to count as it
// goes. Within a piece the kernel copies by itself.
func copyTo(ctx context.Context, dst, src *net.TCPConn, count *atomic.Int64, limit *rate.Limiter) error {
	for {
		n, err := io.CopyN(dst, src, piece)
		count.Add(n)
		switch {
		case err == io.EOF: //nolint:errorlint // as io.CopyN says
			return dst.CloseWrite()
		case err != nil:
			return err
		}
		if err := limit.WaitN(ctx, int(n)); err != nil {
			return err
		}
	}
}

// mayPass reports whether a datagram is within the limit. One that is not is lost.
func mayPass(limit *rate.Limiter, bytes int) bool { return limit.AllowN(time.Now(), bytes) }
