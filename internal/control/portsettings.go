package control

import (
	"context"

	"github.com/nestbox/nestbox"
)

// errPortPrivate is why what a public port let through has ended.
var errPortPrivate = nestbox.Errorf(nestbox.CodeUnauthenticated, "the port is not public any more")

// Settings returns how a port is reached. CodeInvalid, CodeDenied: there is no such
// port, or it is envd's.
func (p *Ports) Settings(ctx context.Context, by Caller, id string, port uint16) (nestbox.PortSettings, error) {
	if err := checkPort(port); err != nil {
		return nestbox.PortSettings{}, err
	}
	capsule, err := p.capsules.Get(ctx, by, id)
	return capsule.Ports[port], err
}

// Set replaces how a port is reached; zero settings are those of a port that nobody
// has set. What goes on over a port that was public and is not any more is ended.
// CodeInvalid: settings cannot be meant, or there is no such port. CodeDenied: it is
// envd's. CodeInvalidState: the capsule has ended. CodeExhausted: too many ports of the
// capsule have settings.
func (p *Ports) Set(ctx context.Context, by Caller, id string, port uint16, settings nestbox.PortSettings) error {
	if err := checkPort(port); err != nil {
		return err
	}
	if err := settings.Validate(); err != nil {
		return err
	}
	capsule, err := p.capsules.Get(ctx, by, id)
	if err != nil {
		return err
	}
	if err := p.cfg.Store.SetPort(ctx, capsule.ID, port, settings); err != nil {
		return err
	}
	if !settings.Public {
		p.public.end(Entry{capsule: capsule.ID, port: port}.name(), errPortPrivate)
	}
	return nil
}
