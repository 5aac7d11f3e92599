// Package hosttest is the suite that every hostagent.Host passes: the Manager
// itself and its twin over Connect. It observes through the interface only.
package hosttest

import (
	"context"
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/hostagent"
)

// Subject is a host under test.
type Subject struct {
	Host hostagent.Host
	// Crash ends the sandbox of a running capsule from outside.
	Crash func(t *testing.T, id string)
}

// patience bounds every wait of the suite. It is long because the machine may
// be busy; no test waits for it to pass.
const patience = time.Minute

// Run runs the suite. newSubject is called once per test.
func Run(t *testing.T, newSubject func(t *testing.T) Subject) {
	for name, test := range map[string]func(*testing.T, Subject){
		"CreateAnswersWhenTheGuestDoes": createAnswersWhenTheGuestDoes,
		"CreateRefuses":                 createRefuses,
		"UnknownCapsule":                unknownCapsule,
		"DestroyForgets":                destroyForgets,
		"DestroyWinsOverCreate":         destroyWinsOverCreate,
		"DeathIsTold":                   deathIsTold,
		"DeathCutsCalls":                deathCutsCalls,
		"DestroyCutsCalls":              destroyCutsCalls,
		"DialReachesLoopbackPrograms":   dialReachesLoopbackPrograms,
		"ManyAtOnce":                    manyAtOnce,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newSubject(t))
		})
	}
}

func newID() string { return nestbox.NewID(nestbox.PrefixCapsule) }

func newSpec() nestbox.CapsuleSpec { return nestbox.CapsuleSpec{}.WithDefaults() }

func create(t *testing.T, h hostagent.Host) hostagent.Status {
	t.Helper()
	status, err := h.Create(within(t), newID(), newSpec())
	require.NoError(t, err)
	t.Cleanup(func() { _ = h.Destroy(context.WithoutCancel(t.Context()), status.ID) })
	return status
}

// within returns a context that outlasts any wait of a test that passes.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func createAnswersWhenTheGuestDoes(t *testing.T, s Subject) {
	status := create(t, s.Host)
	require.Equal(t, hostagent.StateRunning, status.State)

	g, err := s.Host.Guest(within(t), status.ID)
	require.NoError(t, err)
	_, err = g.Ping(within(t))
	require.NoError(t, err)

	got, err := s.Host.Get(within(t), status.ID)
	require.NoError(t, err)
	require.Equal(t, status, got)
	list, err := s.Host.List(within(t))
	require.NoError(t, err)
	require.Len(t, list, 1)

	info, err := s.Host.Info(within(t))
	require.NoError(t, err)
	require.Contains(t, info.Templates, nestbox.TemplateMinimal)
	require.False(t, info.StartedAt.After(status.CreatedAt))
}

func createRefuses(t *testing.T, s Subject) {
	taken := create(t, s.Host)
	for name, c := range map[string]struct {
		spoil func(id *string, spec *nestbox.CapsuleSpec)
		want  nestbox.Code
	}{
		"a bad id":         {func(id *string, _ *nestbox.CapsuleSpec) { *id = "cl-../../etc" }, nestbox.CodeInvalid},
		"a taken id":       {func(id *string, _ *nestbox.CapsuleSpec) { *id = taken.ID }, nestbox.CodeConflict},
		"no such template": {func(_ *string, s *nestbox.CapsuleSpec) { s.Template = "no-such" }, nestbox.CodeNotFound},
		"no memory":        {func(_ *string, s *nestbox.CapsuleSpec) { s.Resources.MemoryMB = 0 }, nestbox.CodeInvalid},
	} {
		id, spec := newID(), newSpec()
		c.spoil(&id, &spec)
		_, err := s.Host.Create(within(t), id, spec)
		require.Equal(t, c.want, nestbox.CodeOf(err), "%s: %v", name, err)
	}
	list, err := s.Host.List(within(t))
	require.NoError(t, err)
	require.Len(t, list, 1, "a refused Create leaves nothing")
}

func unknownCapsule(t *testing.T, s Subject) {
	id := nestbox.NewID(nestbox.PrefixCapsule)
	_, err := s.Host.Get(within(t), id)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	_, err = s.Host.Guest(within(t), id)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.NoError(t, s.Host.Destroy(within(t), id))
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(s.Host.Destroy(within(t), "cl-x")))
}

func destroyForgets(t *testing.T, s Subject) {
	status := create(t, s.Host)
	g, err := s.Host.Guest(within(t), status.ID)
	require.NoError(t, err)
	require.NoError(t, s.Host.Destroy(within(t), status.ID))
	_, err = g.Ping(within(t))
	require.Error(t, err, "a lent guest ends with its capsule")
	_, err = s.Host.Get(within(t), status.ID)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	require.NoError(t, s.Host.Destroy(within(t), status.ID), "destroy may be repeated")
}

// destroyWinsOverCreate destroys capsules while they are being made: whichever
// comes first, nothing is left in the end.
func destroyWinsOverCreate(t *testing.T, s Subject) {
	for range 3 {
		id := newID()
		created := make(chan struct{})
		go func() {
			defer close(created)
			_, _ = s.Host.Create(within(t), id, newSpec())
		}()
		require.NoError(t, s.Host.Destroy(within(t), id))
		<-created
		require.NoError(t, s.Host.Destroy(within(t), id))
		_, err := s.Host.Get(within(t), id)
		require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	}
}

func deathIsTold(t *testing.T, s Subject) {
	status := create(t, s.Host)
	watch := func() (<-chan hostagent.Status, func()) {
		ctx, cancel := context.WithCancel(within(t))
		told, ended := make(chan hostagent.Status, 16), make(chan struct{})
		go func() {
			defer close(ended)
			_ = s.Host.WatchDeaths(ctx, func(s hostagent.Status) { told <- s })
		}()
		return told, func() { cancel(); <-ended }
	}
	expect := func(told <-chan hostagent.Status) {
		select {
		case dead := <-told:
			require.Equal(t, status.ID, dead.ID)
			require.Equal(t, hostagent.StateDead, dead.State)
			require.NotEmpty(t, dead.Reason)
		case <-within(t).Done():
			require.FailNow(t, "nobody told the death")
		}
	}
	told, stop := watch()
	defer stop()
	s.Crash(t, status.ID)
	expect(told)
	later, stopLater := watch()
	defer stopLater()
	expect(later)

	_, err := s.Host.Guest(within(t), status.ID)
	require.Equal(t, nestbox.CodeInvalidState, nestbox.CodeOf(err))
	require.NoError(t, s.Host.Destroy(within(t), status.ID))
	_, err = s.Host.Get(within(t), status.ID)
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
}

func dialReachesLoopbackPrograms(t *testing.T, s Subject) {
	status := create(t, s.Host)
	g, err := s.Host.Guest(within(t), status.ID)
	require.NoError(t, err)
	const serve = `
import socket
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
c, _ = s.accept()
c.sendall(c.recv(100).upper())
c.close()`
	_, reader, err := g.Processes().Start(within(t), nestbox.ProcessSpec{Cmd: "python3", Args: []string{"-c", serve}}, &guest.Attach{})
	require.NoError(t, err)
	defer reader.Close()
	line := ""
	for !strings.HasSuffix(line, "\n") { // which Python writes by itself
		ev, err := reader.Next(within(t))
		require.NoError(t, err)
		line += string(ev.Data)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(line), 10, 16)
	require.NoError(t, err, "%s", line)

	conn, err := g.Dial(within(t), uint16(port))
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("nest"))
	require.NoError(t, err)
	answer, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "NEST", string(answer))

	_, err = g.Dial(within(t), 1)
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err), "%v", err)
	_, err = g.Dial(within(t), 49983)
	// Over the wire no answer about a guest is 403: the control plane says that.
	require.Contains(t, []nestbox.Code{nestbox.CodeDenied, nestbox.CodeGuest}, nestbox.CodeOf(err), "the daemon's own port is closed: %v", err)
}

func manyAtOnce(t *testing.T, s Subject) {
	var wg sync.WaitGroup
	for range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			status, err := s.Host.Create(within(t), newID(), newSpec())
			if err == nil {
				err = s.Host.Destroy(within(t), status.ID)
			}
			if err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	list, err := s.Host.List(within(t))
	require.NoError(t, err)
	require.Empty(t, list)
}
