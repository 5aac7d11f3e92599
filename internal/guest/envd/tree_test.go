package envd

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestListeningPorts(t *testing.T) {
	t.Parallel()
	var want []nestbox.ListeningPort
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue // a machine without IPv6
		}
		defer l.Close()
		at := netip.MustParseAddrPort(l.Addr().String())
		want = append(want, nestbox.ListeningPort{Port: at.Port(), Address: at.Addr()})
	}
	require.NotEmpty(t, want)
	us := []nestbox.SystemProcess{{PID: os.Getpid()}}
	addPorts(us)
	require.Subset(t, us[0].Ports, want)
}

func TestSocketAddresses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"0100007F:1F40":                         "127.0.0.1:8000",
		"00000000:0050":                         "0.0.0.0:80",
		"00000000000000000000000000000000:1F90": "[::]:8080",
		"00000000000000000000000001000000:0001": "[::1]:1",
		"0000000000000000FFFF00000100007F:0016": "127.0.0.1:22",
	} {
		got, err := parseSocket(text)
		require.NoError(t, err)
		require.Equal(t, want, got.String())
	}
	for _, text := range []string{"", ":", "0100007F", "0100007F:", "0100007:1F40", "0100007F:FFFFF", "zz:1", "01:1"} {
		_, err := parseSocket(text)
		require.Error(t, err, text)
	}
	sockets := map[string]nestbox.ListeningPort{}
	file := filepath.Join(t.TempDir(), "tcp")
	require.NoError(t, os.WriteFile(file, []byte("garbage\n  0: 0100007F:1F40 0:0 0A 0 0 0 0 0 77 1\n  1: 0100007F:1F41 0:0 01 0 0 0 0 0 78 1\n"), 0o600))
	readListeners(file, sockets)
	readListeners(file+".none", sockets)
	require.Equal(t, map[string]nestbox.ListeningPort{"socket:[77]": {Port: 8000, Address: netip.MustParseAddr("127.0.0.1")}}, sockets)
}
