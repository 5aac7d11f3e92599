package guestrpc

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
	guestv1 "github.com/nestbox/nestbox/gen/nestbox/guest/v1"
	"github.com/nestbox/nestbox/gen/nestbox/guest/v1/guestv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// Lookup finds the guest that a request is for. It is called once per request,
// before the body is read.
type Lookup func(r *http.Request) (guest.Guest, error)

// NewHandler serves the guests that lookup finds, under
// /nestbox.guest.v1.GuestService/ and /tunnel/. It asks for no credential: see
// RequireToken. A tunnel ends with its ends or with the server's base context;
// http.Server.Close and Shutdown do not know of it.
func NewHandler(lookup Lookup) http.Handler {
	return newHandler(lookup, aliveEvery)
}

func newHandler(lookup Lookup, alive time.Duration) http.Handler {
	server := connect.NewServer(reuseUploads)
	guestv1connect.RegisterGuestServiceHandler(server, handler{alive: alive})
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server, options()...)
	mux.HandleFunc("POST /tunnel/{port}", serveTunnel)
	listings := newSlots(maxListings)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g, err := lookup(r)
		if err != nil {
			// The rest of a body, which may never come, is not waited for.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(restIn))
			rpcerr.WriteHTTP(w, r, err)
			return
		}
		if isListing[r.URL.Path] {
			if err := listings.wait(r.Context()); err != nil {
				rpcerr.WriteHTTP(w, r, err)
				return
			}
			defer listings.give()
		}
		ctx := context.WithValue(r.Context(), guestKey{}, g)
		ctx = context.WithValue(ctx, connectionKey{}, http.NewResponseController(w))
		mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

// maxListings is how many listings are made and sent at a time: each may be
// large. Others wait.
const maxListings = 4

var isListing = map[string]bool{
	guestv1connect.GuestServiceListProcedure:      true,
	guestv1connect.GuestServiceTreeProcedure:      true,
	guestv1connect.GuestServiceListFilesProcedure: true,
}

// RequireToken lets only requests through that carry token in TokenHeader. With
// an empty token it lets none through.
func RequireToken(token string, next http.Handler) http.Handler {
	// Hashes have one length, so that the comparison tells nothing of the
	// token's own.
	want := sha256.Sum256([]byte(token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got := sha256.Sum256([]byte(r.Header.Get(TokenHeader)))
		if token == "" || subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			refuse(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// refuse answers 401 with a Connect error for a body, also to streams, whose
// errors otherwise come with status 200: a client without a token need not speak
// Connect to understand.
func refuse(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = w.Write([]byte(`{"code":"unauthenticated","message":"missing or wrong token"}`))
}

type guestKey struct{}

// guestOf returns the guest that the request of ctx is for.
func guestOf(ctx context.Context) guest.Guest {
	g, _ := ctx.Value(guestKey{}).(guest.Guest)
	return g
}

type connectionKey struct{}

// restIn is how long a request that is answered already may go on coming: a sender
// that is cut off at once would not see the answer.
const restIn = 500 * time.Millisecond

// cutRequest ends the reading of the request of ctx.
func cutRequest(ctx context.Context) {
	if rc, ok := ctx.Value(connectionKey{}).(*http.ResponseController); ok {
		_ = rc.SetReadDeadline(time.Now().Add(restIn)) // every server of ours can
	}
}

// handler serves the guest of each request's context.
type handler struct {
	alive time.Duration // see aliveEvery
}

var _ guestv1connect.GuestServiceHandler = handler{}

// Ping implements guestv1connect.GuestServiceHandler.
func (handler) Ping(ctx context.Context, _ *guestv1.PingRequest) (*guestv1.PingResponse, error) {
	info, err := guestOf(ctx).Ping(ctx)
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return infoToWire(info), nil
}

// List implements guestv1connect.GuestServiceHandler.
func (handler) List(ctx context.Context, req *guestv1.ListRequest) (*guestv1.ListResponse, error) {
	procs, err := guestOf(ctx).Processes().List(ctx, req.GetAll())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	res := &guestv1.ListResponse{Processes: make([]*guestv1.Process, len(procs))}
	for i, p := range procs {
		res.Processes[i] = processToWire(p)
	}
	return res, nil
}

// Get implements guestv1connect.GuestServiceHandler.
func (handler) Get(ctx context.Context, req *guestv1.GetRequest) (*guestv1.GetResponse, error) {
	p, err := guestOf(ctx).Processes().Get(ctx, selectorFromWire(req.GetSelector()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.GetResponse{Process: processToWire(p)}, nil
}

// Wait implements guestv1connect.GuestServiceHandler.
func (handler) Wait(ctx context.Context, req *guestv1.WaitRequest) (*guestv1.WaitResponse, error) {
	p, err := guestOf(ctx).Processes().Wait(ctx, selectorFromWire(req.GetSelector()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.WaitResponse{Process: processToWire(p)}, nil
}

// WriteStdin implements guestv1connect.GuestServiceHandler.
func (handler) WriteStdin(ctx context.Context, req *guestv1.WriteStdinRequest) (*guestv1.WriteStdinResponse, error) {
	if len(req.GetData()) > nestbox.MaxStdin {
		return nil, rpcerr.ToConnect(nestbox.Errorf(nestbox.CodeTooLarge, "more than %d bytes for standard input at once", nestbox.MaxStdin))
	}
	err := guestOf(ctx).Processes().WriteStdin(ctx, selectorFromWire(req.GetSelector()), req.GetData(), req.GetEof())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.WriteStdinResponse{}, nil
}

// Resize implements guestv1connect.GuestServiceHandler.
func (handler) Resize(ctx context.Context, req *guestv1.ResizeRequest) (*guestv1.ResizeResponse, error) {
	err := guestOf(ctx).Processes().Resize(ctx, selectorFromWire(req.GetSelector()), int(req.GetRows()), int(req.GetCols()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.ResizeResponse{}, nil
}

// Signal implements guestv1connect.GuestServiceHandler.
func (handler) Signal(ctx context.Context, req *guestv1.SignalRequest) (*guestv1.SignalResponse, error) {
	err := guestOf(ctx).Processes().Signal(ctx, selectorFromWire(req.GetSelector()), syscall.Signal(req.GetSignal()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.SignalResponse{}, nil
}

// Kill implements guestv1connect.GuestServiceHandler.
func (handler) Kill(ctx context.Context, req *guestv1.KillRequest) (*guestv1.KillResponse, error) {
	p, err := guestOf(ctx).Processes().Kill(ctx, selectorFromWire(req.GetSelector()), killFromWire(req))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &guestv1.KillResponse{Process: processToWire(p)}, nil
}

// KillBiggest implements guestv1connect.GuestServiceHandler.
func (handler) KillBiggest(ctx context.Context, req *guestv1.KillBiggestRequest) (*guestv1.KillBiggestResponse, error) {
	v, err := guestOf(ctx).Processes().KillBiggest(ctx, req.GetUsed())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	res := &guestv1.KillBiggestResponse{Memory: v.Memory}
	if v.Process.PID != 0 {
		res.Process = processToWire(v.Process)
	}
	return res, nil
}
