package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/nestbox/nestbox"
)

// ownAddress is an address of this machine that is not its loopback. The server that is
// measured lets capsules reach it.
func ownAddress() (net.IP, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil && !ip.IP.IsLoopback() {
			return ip.IP, nil
		}
	}
	return nil, errors.New("this machine has no address but its loopback")
}

// connects makes n connections, one after the other, with a byte each way, and prints what
// one takes in nanoseconds.
const connects = `
import socket, sys, time
host, port, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begin = time.monotonic_ns()
for _ in range(n):
    with socket.create_connection((host, port)) as s:
        s.sendall(b"x")
        s.recv(1)
print((time.monotonic_ns() - begin) // n)`

const downloadBytes = 256 << 20

// egress compares what goes out of a capsule with the same programs on the host.
func (b *bench) egress(ctx context.Context) error {
	ip, err := ownAddress()
	if err != nil {
		return err
	}
	site, err := net.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		return err
	}
	zeros := make([]byte, 1<<20)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for range downloadBytes / len(zeros) {
			if _, err := w.Write(zeros); err != nil {
				return
			}
		}
	})}
	go func() { _ = server.Serve(site) }()
	defer server.Close()
	echo, err := net.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		return err
	}
	defer echo.Close()
	go answerByte(echo)

	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	inside := func(args ...string) (string, error) {
		out, err := c.CommandContext(ctx, args[0], args[1:]...).Output()
		return string(out), err
	}
	outside := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
		return string(out), err
	}
	_, port, err := net.SplitHostPort(echo.Addr().String())
	if err != nil {
		return err
	}
	var fetch, connect [2][]time.Duration // inside, outside
	for range max(b.rounds/4, 3) {
		for i, run := range []func(...string) (string, error){inside, outside} {
			t, err := seconds(run("curl", "-sS", "-o", "/dev/null", "-w", "%{time_total}", "http://"+site.Addr().String()+"/"))
			if err != nil {
				return err
			}
			fetch[i] = append(fetch[i], t)
			text, err := run("python3", "-c", connects, ip.String(), port, "200")
			if err != nil {
				return err
			}
			ns, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			if err != nil {
				return err
			}
			connect[i] = append(connect[i], time.Duration(ns))
		}
	}
	change, err := b.policyChanges(ctx, c.SetNetwork)
	if err != nil {
		return err
	}
	mbs := func(t time.Duration) string { return fmt.Sprintf("%.0f MB/s", downloadBytes/1e6/t.Seconds()) }
	in, out := median(fetch[0]), median(fetch[1])
	conn, there := median(connect[0]), median(connect[1])
	b.rows = append(b.rows,
		row{"download through the way out (p50)", mbs(in), "curl on the host: " + mbs(out), fmt.Sprintf("%.2f", ratio(out, in)), "≥ 0.05", ratio(out, in) >= 0.05},
		row{"new connection, a byte there and back (p50)", ms(conn), "on the host: " + ms(there), fmt.Sprintf("%+.2f ms", float64(conn-there)/1e6), "≤ +3 ms", conn-there <= 3*time.Millisecond},
		row{"policy change (p50)", ms(change), "-", "-", "≤ 20 ms", change <= 20*time.Millisecond},
	)
	return nil
}

func (b *bench) policyChanges(ctx context.Context, set func(context.Context, nestbox.NetworkPolicy) (nestbox.NetworkPolicy, error)) (time.Duration, error) {
	var times []time.Duration
	for i := range b.rounds {
		t, err := timed(func() error {
			_, err := set(ctx, nestbox.NetworkPolicy{Internet: i%2 == 0})
			return err
		})
		if err != nil {
			return 0, err
		}
		times = append(times, t)
	}
	return median(times), nil
}

func seconds(text string, err error) (time.Duration, error) {
	if err != nil {
		return 0, err
	}
	s, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
	return time.Duration(s * float64(time.Second)), err
}

// answerByte answers each connection's first byte.
func answerByte(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			one := make([]byte, 1)
			if n, _ := conn.Read(one); n == 1 {
				_, _ = conn.Write(one)
			}
		}()
	}
}
