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
	// client takes the connection to be lost. After half of it the daemon is asked
	// whether it lives.
	silentFor = 3 * aliveEvery

	// maxMessage bounds what is sent to a daemon in one message: the largest is
	// WriteStdin with nestbox.MaxStdin bytes. Answers have limits of their own.
	maxMessage = 8 << 20

	// fileChunk is how much of a file travels in one message.
	fileChunk = 256 << 10

	// minUpload is how much of a slow upload is gathered for one message.
	minUpload = 32 << 10

	// maxPut is how long a file may be that travels in one message, with all that is
	// to be said of it.
	maxPut = 32 << 10

	// maxData is how much output travels in one message.
	maxData = 256 << 10

	// A message of a listing has at most so many entries, and not many more bytes
	// than that.
	listChunk      = 1000
	listChunkBytes = 256 << 10
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
