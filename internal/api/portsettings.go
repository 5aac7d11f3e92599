package api

import (
	"context"
	"net/http"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

// PortPath is what every path about one port has in it.
type PortPath struct {
	CapsulePath
	Port string `path:"port" doc:"1 to 65535, without leading zeros" example:"8080"`
}

// portSettingsBody is how a port is to be reached.
type portSettingsBody struct {
	Public      bool     `json:"public,omitempty" doc:"Whoever knows the address is let in, without a key or token"`
	HostHeader  string   `json:"host_header,omitempty" doc:"The host, such as localhost:5173, that the program is to think it is reached as, in all headers; empty = the one that the client asked"`
	Protocol    string   `json:"protocol,omitempty" enum:"http,https,h2c" doc:"What the program speaks: HTTP/1.1, TLS with any certificate, or HTTP/2 in clear; empty = http, but for gRPC h2c"`
	CORSOrigins []string `json:"cors_origins,omitempty" nullable:"false" doc:"Origins whose pages may read what the port answers: https://app.example.com, https://*.example.com or *; at most 16. Empty = those that the program says"`
}

func (b portSettingsBody) domain() nestbox.PortSettings {
	return nestbox.PortSettings{
		Public: b.Public, HostHeader: b.HostHeader, Protocol: nestbox.PortProtocol(b.Protocol), CORSOrigins: b.CORSOrigins,
	}
}

// portSettings is how a port is reached.
type portSettings struct {
	Port        uint16   `json:"port"`
	Public      bool     `json:"public"`
	HostHeader  string   `json:"host_header"`
	Protocol    string   `json:"protocol"`
	CORSOrigins []string `json:"cors_origins" nullable:"false"`
}

func toPortSettings(port uint16, s nestbox.PortSettings) portSettings {
	return portSettings{
		Port: port, Public: s.Public, HostHeader: s.HostHeader, Protocol: string(s.Protocol), CORSOrigins: orEmpty(s.CORSOrigins),
	}
}

// portsOf are the settings of a capsule's ports, by port.
func portsOf(c nestbox.Capsule) []portSettings {
	list := []portSettings{}
	for _, port := range c.PortsWithSettings() {
		list = append(list, toPortSettings(port, c.Ports[port]))
	}
	return list
}

type setPortInput struct {
	PortPath
	Body portSettingsBody
}

type portSettingsOutput struct {
	Body portSettings
}

type listPortsOutput struct {
	Body []portSettings `nullable:"false"`
}

func (s *server) registerPortSettings() {
	const tag, path = "Ports", "/v1/capsules/{id}/ports/{port}"
	example := toPortSettings(5173, nestbox.PortSettings{HostHeader: "localhost:5173"})
	register(s, operation{
		id: "listPorts", method: http.MethodGet, path: "/v1/capsules/{id}/ports", tag: tag,
		summary: "List the ports that have settings",
		about:   "By port; at most 64. Which ports are listened on is told by `GET …/processes?descendants=true`.",
		answer:  []portSettings{example},
		errors:  []int{http.StatusNotFound},
	}, func(ctx context.Context, caller control.Caller, in *CapsulePath) (*listPortsOutput, error) {
		c, err := s.control.Capsules.Get(ctx, caller, in.ID)
		return &listPortsOutput{Body: portsOf(c)}, err
	})
	register(s, operation{
		id: "getPort", method: http.MethodGet, path: path, tag: tag,
		summary: "Get how a port is reached", about: "Any port; nothing needs to be set or to listen.",
		answer: example,
		errors: []int{http.StatusForbidden, http.StatusNotFound},
	}, s.getPort)
	register(s, operation{
		id: "setPort", method: http.MethodPut, path: path, tag: tag,
		summary: "Replace how a port is reached",
		about: "All settings of the port are replaced, from the next request on. Nothing needs to listen yet. " +
			"What goes on over a port that was public and is not any more is ended.",
		request: portSettingsBody{HostHeader: "localhost:5173"},
		answer:  example,
		errors:  []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests},
	}, s.setPort)
	register(s, operation{
		id: "resetPort", method: http.MethodDelete, path: path, tag: tag,
		summary: "Forget what is set of a port", about: "May be repeated.",
		status: http.StatusNoContent,
		errors: []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict},
	}, func(ctx context.Context, caller control.Caller, in *PortPath) (*nothing, error) {
		port, err := parsePort(in.Port)
		if err != nil {
			return nil, err
		}
		return nil, s.control.Ports.Set(ctx, caller, in.ID, port, nestbox.PortSettings{})
	})
}

func (s *server) getPort(ctx context.Context, caller control.Caller, in *PortPath) (*portSettingsOutput, error) {
	port, err := parsePort(in.Port)
	if err != nil {
		return nil, err
	}
	settings, err := s.control.Ports.Settings(ctx, caller, in.ID, port)
	return &portSettingsOutput{Body: toPortSettings(port, settings)}, err
}

func (s *server) setPort(ctx context.Context, caller control.Caller, in *setPortInput) (*portSettingsOutput, error) {
	port, err := parsePort(in.Port)
	if err != nil {
		return nil, err
	}
	settings := in.Body.domain()
	err = s.control.Ports.Set(ctx, caller, in.ID, port, settings)
	return &portSettingsOutput{Body: toPortSettings(port, settings)}, err
}
