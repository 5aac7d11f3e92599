package runsc

import (
	_ "unsafe" // for the variable of gVisor

	"gvisor.dev/gvisor/pkg/sentry/platform"
	_ "gvisor.dev/gvisor/pkg/sentry/platform/systrap" // registers itself first
)

// seccompNotifyIsSupported is gVisor's: whether the sentry hands system calls to the
// threads of its stub processes by seccomp's notifications, or by futexes.
//
//go:linkname seccompNotifyIsSupported gvisor.dev/gvisor/pkg/sentry/platform/systrap.seccompNotifyIsSupported
var seccompNotifyIsSupported bool

// retriesNotifications is whether gVisor was compiled with scripts/patch-gvisor: the
// patch says so.
//
//go:linkname retriesNotifications gvisor.dev/gvisor/pkg/sentry/platform/systrap.retriesNotifications
var retriesNotifications bool

// byFutex is gVisor's systrap without seccomp's notifications, for a gVisor of which one
// that is interrupted just as it is received is the end. Starting processes takes twice
// as long.
type byFutex struct{ platform.Constructor }

// New implements platform.Constructor.
func (b byFutex) New(opts platform.Options) (platform.Platform, error) {
	p, err := b.Constructor.New(opts)
	seccompNotifyIsSupported = false // New has looked whether it is; nobody has asked yet
	return p, err
}

func init() {
	if retriesNotifications {
		return
	}
	const name = "systrap"
	systrap, err := platform.Lookup(name)
	if err != nil {
		panic("gVisor has no " + name)
	}
	platform.Register(name, byFutex{systrap})
}
