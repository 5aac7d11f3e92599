package hostrpc

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
	hostv1 "github.com/nestbox/nestbox/gen/nestbox/host/v1"
	"github.com/nestbox/nestbox/gen/nestbox/host/v1/hostv1connect"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/guestrpc"
	"github.com/nestbox/nestbox/internal/hostagent"
	"github.com/nestbox/nestbox/internal/rpcerr"
)

// maxMessage bounds one request; they are all small.
const maxMessage = 1 << 20

// aliveEvery is how often a quiet WatchDeaths stream says that it lives.
const aliveEvery = 15 * time.Second

// NewHandler serves host, and the guests of its capsules, to callers that send
// token in the header guestrpc.TokenHeader.
func NewHandler(host hostagent.Host, token string) http.Handler {
	server := connect.NewServer()
	hostv1connect.RegisterHostServiceHandler(server, handler{host: host})
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server, connecthttp.WithReadMaxBytes(maxMessage))
	mux.Handle("/", guestrpc.NewHandler(func(r *http.Request) (guest.Guest, error) {
		g, err := host.Guest(r.Context(), r.Header.Get(capsuleHeader))
		if nestbox.CodeOf(err) == nestbox.CodeNotFound { // it was lent, and so there
			err = nestbox.StateStopping.NotRunning("")
		}
		return g, err
	}))
	return guestrpc.RequireToken(token, mux)
}

type handler struct{ host hostagent.Host }

func (h handler) Info(ctx context.Context, _ *hostv1.InfoRequest) (*hostv1.InfoResponse, error) {
	info, err := h.host.Info(ctx)
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return infoToWire(info), nil
}

func (h handler) Create(ctx context.Context, req *hostv1.CreateRequest) (*hostv1.CreateResponse, error) {
	status, err := h.host.Create(ctx, req.GetId(), specFromWire(req.GetSpec()))
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &hostv1.CreateResponse{Status: statusToWire(status)}, nil
}

func (h handler) Destroy(ctx context.Context, req *hostv1.DestroyRequest) (*hostv1.DestroyResponse, error) {
	if err := h.host.Destroy(ctx, req.GetId()); err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &hostv1.DestroyResponse{}, nil
}

func (h handler) Get(ctx context.Context, req *hostv1.GetRequest) (*hostv1.GetResponse, error) {
	status, err := h.host.Get(ctx, req.GetId())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &hostv1.GetResponse{Status: statusToWire(status)}, nil
}

func (h handler) List(ctx context.Context, _ *hostv1.ListRequest) (*hostv1.ListResponse, error) {
	list, err := h.host.List(ctx)
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	res := &hostv1.ListResponse{}
	for _, s := range list {
		res.Statuses = append(res.Statuses, statusToWire(s))
	}
	return res, nil
}

func (h handler) SetNetwork(ctx context.Context, req *hostv1.SetNetworkRequest) (*hostv1.SetNetworkResponse, error) {
	if err := h.host.SetNetwork(ctx, req.GetId(), policyFromWire(req.GetPolicy())); err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return &hostv1.SetNetworkResponse{}, nil
}

func (h handler) Network(ctx context.Context, req *hostv1.NetworkRequest) (*hostv1.NetworkResponse, error) {
	report, err := h.host.Network(ctx, req.GetId())
	if err != nil {
		return nil, rpcerr.ToConnect(err)
	}
	return reportToWire(report), nil
}

// WatchDeaths sends an empty message first and on a quiet stream, so that the
// caller knows that it watches and that the host lives.
func (h handler) WatchDeaths(ctx context.Context, _ *hostv1.WatchDeathsRequest, stream hostv1connect.HostServiceWatchDeathsServerStream) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	deaths := make(chan hostagent.Status)
	ended := make(chan error, 1)
	go func() {
		ended <- h.host.WatchDeaths(ctx, func(s hostagent.Status) {
			select {
			case deaths <- s:
			case <-ctx.Done():
			}
		})
	}()
	alive := time.NewTicker(aliveEvery)
	defer alive.Stop()
	err := stream.Send(&hostv1.WatchDeathsResponse{})
	for err == nil {
		select {
		case s := <-deaths:
			err = stream.Send(&hostv1.WatchDeathsResponse{Status: statusToWire(s)})
		case <-alive.C:
			err = stream.Send(&hostv1.WatchDeathsResponse{})
		case err := <-ended:
			return rpcerr.ToConnect(err)
		}
	}
	cancel()
	<-ended
	return err
}
