package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
	"github.com/nestbox/nestbox/internal/splice"
)

func newPortForward(a *app) *cobra.Command {
	address := "127.0.0.1"
	cmd := &cobra.Command{
		Use:   "port-forward <capsule> <port>… [port:local…]",
		Short: "Listen here for TCP connections to ports inside a capsule",
		Long: `Listen on this machine, and forward each TCP connection to a port inside a capsule:
5432 to the same port here, 5432:15432 to another, 5432:0 to a free one. It goes on
until it is interrupted, through lost connections and restarts of the server.`,
		Example: `  nestbox port-forward cl-4f 5432 &  psql -h 127.0.0.1
  nestbox port-forward cl-4f 8000:0 9229`,
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			var pairs []portPair
			for _, arg := range args[1:] {
				pair, err := parsePorts(arg)
				if err != nil {
					return err
				}
				pairs = append(pairs, pair)
			}
			capsule, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.forwardPorts(cmd.Context(), capsule, address, pairs)
		},
	}
	cmd.Flags().StringVar(&address, "address", address, "address to listen on; one that others can reach lets them into the capsule")
	return cmd
}

// portPair is a port inside a capsule and the one here that leads to it.
type portPair struct{ remote, local uint16 }

// parsePorts reads remote[:local].
func parsePorts(arg string) (portPair, error) {
	remote, local, two := strings.Cut(arg, ":")
	r, err := strconv.ParseUint(remote, 10, 16)
	l := r
	if err == nil && two {
		l, err = strconv.ParseUint(local, 10, 16)
	}
	if err != nil || r == 0 {
		return portPair{}, nestbox.Errorf(nestbox.CodeInvalid, "%q is not a port, or port:local: 1 to 65535", arg)
	}
	return portPair{uint16(r), uint16(l)}, nil
}

func (a *app) forwardPorts(ctx context.Context, capsule *client.Capsule, address string, pairs []portPair) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	signals := make(chan os.Signal, 1)
	defer a.Signals(signals)()
	var forwarding sync.WaitGroup
	defer forwarding.Wait()
	defer cancel()
	for _, pair := range pairs {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(int(pair.local))))
		if err != nil {
			return err
		}
		tunnel := capsule.Ports.Tunnel(pair.remote)
		context.AfterFunc(ctx, func() {
			_ = l.Close()
			_ = tunnel.Close()
		})
		if err := a.printForward(l.Addr(), pair.remote); err != nil {
			return err
		}
		forwarding.Go(func() { a.forwardPort(ctx, l, tunnel, pair.remote) })
	}
	select {
	case <-signals:
	case <-ctx.Done():
	}
	return nil
}

func (a *app) printForward(local net.Addr, remote uint16) error {
	if !a.json {
		return a.println(fmt.Sprintf("forwarding %s to port %d", local, remote))
	}
	return a.printJSON(struct {
		Local string `json:"local"`
		Port  uint16 `json:"port"`
	}{local.String(), remote})
}

// Accepting fails for a while when there are too many files open.
const acceptPause = 100 * time.Millisecond

// forwardPort answers the connections of a listener until ctx ends.
func (a *app) forwardPort(ctx context.Context, l net.Listener, tunnel *client.Tunnel, port uint16) {
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			a.warn("port %d: %v", port, err)
			timer := time.NewTimer(acceptPause)
			<-timer.C
			continue
		}
		open.Go(func() {
			target, err := tunnel.Dial(ctx)
			if err != nil {
				_ = conn.Close()
				if ctx.Err() == nil {
					a.warn("port %d: %v", port, err)
				}
				return
			}
			splice.Both(ctx, conn, target)
		})
	}
}
