// Package guestrpc carries a guest.Guest over HTTP/1.1: Connect for processes
// and files, and an upgraded connection for each port that is dialled.
//
// NewHandler serves a Guest and Client is one, so that a Guest can be lent over
// any number of hops. Nothing is kept between the two but what is in flight:
// back-pressure passes from the last reader to the process.
//
// It may import the guest contract, generated code and rpcerr; never an
// implementation of the contract.
package guestrpc

import (
	"time"

	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
)

// TokenHeader is the request header that carries the access token.
const TokenHeader = "Nestbox-Token"

const (
	// aliveEvery is how long an output stream is silent before its server says
	// that it lives.
	aliveEvery = 15 * time.Second

	// silentFor is how long an output stream may say nothing at all before its
	// client takes the connection to be lost.
	silentFor = 3 * aliveEvery

	// maxMessage bounds one message, both ways, but for maxList: the largest is
	// WriteStdin with nestbox.MaxStdin bytes.
	maxMessage = 8 << 20

	// maxList bounds a list of processes, each of which may have a megabyte of
	// arguments.
	maxList = 64 << 20

	// fileChunk is how much of a file travels in one message.
	fileChunk = 512 << 10

	// minUpload is how much of a slow upload is gathered for one message.
	minUpload = 32 << 10

	// listChunk is how many entries of a listing travel in one message.
	listChunk = 1000
)

// options are those of both sides. Only what we use is spoken: no JSON and no
// compression (all hops are on fast networks, and the data is anything).
func options() []connecthttp.Option {
	return []connecthttp.Option{
		connecthttp.WithCodecs(codec{connectproto.NewBinaryCodec()}),
		connecthttp.WithCompressors(),
		connecthttp.WithReadMaxBytes(maxMessage),
	}
}
