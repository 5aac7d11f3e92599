package rpcerr

import (
	"encoding/json"
	"io"
	"net/http"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/nestbox/nestbox"
)

// maxErrorBody bounds what ReadHTTP reads of an answer.
const maxErrorBody = 64 << 10

// WriteHTTP answers r with err, in the form that the client of an RPC, or
// ReadHTTP, understands. Nothing may have been written to w yet.
func WriteHTTP(w http.ResponseWriter, r *http.Request, err error) {
	// It fails only if the client is gone.
	_ = connecthttp.NewErrorWriter().Write(w, r, ToConnect(err))
}

// ReadHTTP returns the error of an answer that is no RPC's, as WriteHTTP wrote
// it; see FromConnect for transport.
func ReadHTTP(res *http.Response, transport nestbox.Code) error {
	var body struct {
		Code    connect.Code `json:"code"`
		Message string       `json:"message"`
		Details []struct {
			Type  string `json:"type"`
			Value string `json:"value"` // base64
		} `json:"details"`
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxErrorBody)).Decode(&body); err != nil {
		return FromConnect(err, transport)
	}
	wire := connect.NewError(body.Code, body.Message).WithRemote()
	for _, d := range body.Details {
		value, err := connect.DecodeBinaryHeader(d.Value)
		if err != nil {
			return FromConnect(err, transport)
		}
		wire = wire.WithDetail(&connect.ErrorDetail{Type: d.Type, Value: value})
	}
	return FromConnect(wire, transport)
}
