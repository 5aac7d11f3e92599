package cli

import (
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
)

// portSettingsJSON is a port's settings as the API shows them.
type portSettingsJSON struct {
	Port        uint16   `json:"port"`
	Public      bool     `json:"public"`
	HostHeader  string   `json:"host_header"`
	Protocol    string   `json:"protocol"`
	CORSOrigins []string `json:"cors_origins"`
}

func portSettingsView(port uint16, s nestbox.PortSettings) portSettingsJSON {
	return portSettingsJSON{port, s.Public, s.HostHeader, string(s.Protocol), append([]string{}, s.CORSOrigins...)}
}

func portsView(ports map[uint16]nestbox.PortSettings) []portSettingsJSON {
	var views []portSettingsJSON
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		views = append(views, portSettingsView(port, ports[port]))
	}
	return views
}

// words says in one line what differs from a port of which nobody has set anything.
func (p portSettingsJSON) words() string {
	words := []string{"private"}
	if p.Public {
		words[0] = "public"
	}
	if p.HostHeader != "" {
		words = append(words, "as "+p.HostHeader)
	}
	if p.Protocol != "" {
		words = append(words, p.Protocol)
	}
	if len(p.CORSOrigins) > 0 {
		words = append(words, "pages of "+strings.Join(p.CORSOrigins, " "))
	}
	return strings.Join(words, "; ")
}

func newPort(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "port", Short: "Say how a port inside a capsule is reached", Args: cobra.NoArgs, RunE: help}
	cmd.AddCommand(newPortList(a), newPortSet(a), newPortReset(a))
	return cmd
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "%q is not a port: 1 to 65535", text)
	}
	return uint16(port), nil
}

func newPortList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "ls <capsule>",
		Aliases: []string{"list"},
		Short:   "List the ports that have settings",
		Args:    usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			ports, err := h.Ports.List(cmd.Context())
			if err != nil {
				return err
			}
			views := portsView(ports)
			if a.json {
				return a.printJSON(append([]portSettingsJSON{}, views...))
			}
			t := a.table("PORT", "REACHED")
			for _, v := range views {
				t.row(strconv.Itoa(int(v.Port)), v.words())
			}
			return t.flush()
		},
	}
}

// ownHost stands for localhost and the port itself.
const ownHost = "localhost:PORT"

func newPortSet(a *app) *cobra.Command {
	var settings nestbox.PortSettings
	var protocol string
	cmd := &cobra.Command{
		Use:   "set <capsule> <port>",
		Short: "Replace how a port is reached",
		Long: `Replace how a port is reached, from the next request on: the flags say all of it.
What goes on over a port that was public and is not any more is ended.`,
		Example: `  nestbox port set cl-12 5173 --rewrite-host          # for Vite, which refuses other hosts
  nestbox port set cl-12 8080 --public                # whoever knows the address is let in
  nestbox port set cl-12 50051 --protocol h2c         # HTTP/2 in clear; gRPC needs no word
  nestbox port set cl-12 8443 --protocol https --cors-origin https://app.example.com`,
		Args: usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := parsePort(args[1])
			if err != nil {
				return err
			}
			settings.Protocol = nestbox.PortProtocol(protocol)
			if settings.HostHeader == ownHost {
				settings.HostHeader = net.JoinHostPort("localhost", args[1])
			}
			if settings.IsZero() {
				return nestbox.Errorf(nestbox.CodeInvalid, "say how it is reached: --public, --rewrite-host, --protocol or --cors-origin; nestbox port reset forgets what is set")
			}
			if err := settings.Validate(); err != nil {
				return err
			}
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := h.Ports.Set(cmd.Context(), port, settings); err != nil {
				return err
			}
			v := portSettingsView(port, settings)
			if a.json {
				return a.printJSON(v)
			}
			return a.println(v.words())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&settings.Public, "public", false, "let in whoever knows the address, without a credential")
	f.StringVar(&settings.HostHeader, "rewrite-host", "", "have the program think that it is reached as this host")
	f.Lookup("rewrite-host").NoOptDefVal = ownHost
	f.StringVar(&protocol, "protocol", "", "what the program speaks: http, https or h2c (default http, but for gRPC h2c)")
	f.StringSliceVar(&settings.CORSOrigins, "cors-origin", nil, "origin, such as https://app.example.com or *, whose pages may read what the port answers")
	return cmd
}

func newPortReset(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "reset <capsule> <port>",
		Short: "Forget what is set of a port",
		Args:  usual, ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := parsePort(args[1])
			if err != nil {
				return err
			}
			h, err := a.capsule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return h.Ports.Reset(cmd.Context(), port)
		},
	}
}
