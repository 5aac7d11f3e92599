package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nestbox/nestbox"
)

// printJSON prints a value for programs, in the form that the API has.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.Out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (a *app) println(s string) error {
	_, err := fmt.Fprintln(a.Out, s)
	return err
}

// warn says something beside the output.
func (a *app) warn(format string, args ...any) {
	fmt.Fprintf(a.Err, "nestbox: "+format+"\n", args...)
}

// table is aligned output for people.
type table struct{ w *tabwriter.Writer }

func (a *app) table(header ...string) *table {
	t := &table{tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)}
	if len(header) > 0 {
		t.row(header...)
	}
	return t
}

// row adds a line. Cells are made printable: a capsule's own words must not
// steer the terminal that shows them.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = printable(c)
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() error { return t.w.Flush() }

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || (r >= 0x7f && r < 0xa0) {
			return '\uFFFD'
		}
		return r
	}, s)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// capsuleJSON is a capsule as the API shows it.
type capsuleJSON struct {
	ID           string            `json:"id"`
	Name         string            `json:"name,omitempty"`
	Hostname     string            `json:"hostname,omitempty"`
	EnvNames     []string          `json:"env_names,omitempty"`
	Status       string            `json:"status"`
	Reason       string            `json:"reason,omitempty"`
	Template     string            `json:"template"`
	VCPUs        int               `json:"vcpus"`
	MemoryMB     int               `json:"memory_mb"`
	DiskMB       int               `json:"disk_mb"`
	PidsMax      int               `json:"pids_max"`
	TimeoutSec   int               `json:"timeout_sec"`
	CreatedAt    time.Time         `json:"created_at"`
	StartedAt    *time.Time        `json:"started_at,omitempty"`
	LastActiveAt *time.Time        `json:"last_active_at,omitempty"`
	LastUpdated  time.Time         `json:"last_updated"`
	Metadata     map[string]string `json:"metadata,omitempty"`
	Unresponsive *unresponsiveJSON `json:"unresponsive,omitempty"`

	Network nestbox.NetworkPolicy `json:"network"`
	Ports   []portSettingsJSON    `json:"ports,omitempty"`
}

type unresponsiveJSON struct {
	Since time.Time `json:"since"`
}

func capsuleView(c nestbox.Capsule) capsuleJSON {
	var frozen *unresponsiveJSON
	if !c.UnresponsiveSince.IsZero() {
		frozen = &unresponsiveJSON{c.UnresponsiveSince}
	}
	return capsuleJSON{
		Unresponsive: frozen,
		Network:      c.NetworkPolicy(),
		Ports:        portsView(c.Ports),

		ID: c.ID, Name: c.Name, Hostname: c.Hostname, EnvNames: c.EnvNames, Status: string(c.State), Reason: c.Reason, Template: c.Template,
		VCPUs: c.Resources.VCPUs, MemoryMB: c.Resources.MemoryMB, DiskMB: c.Resources.DiskMB, PidsMax: c.Resources.PidsMax,
		TimeoutSec: c.TimeoutSec, CreatedAt: c.CreatedAt, StartedAt: optional(c.StartedAt), LastActiveAt: optional(c.LastActiveAt),
		LastUpdated: c.UpdatedAt, Metadata: c.Metadata,
	}
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// processJSON is a process as the API shows it.
type processJSON struct {
	ID        string     `json:"id"`
	PID       int        `json:"pid"`
	Tag       string     `json:"tag"`
	Cmd       string     `json:"cmd"`
	Args      []string   `json:"args,omitempty"`
	ArgsCut   bool       `json:"args_cut,omitempty"`
	Cwd       string     `json:"cwd"`
	User      string     `json:"user"`
	State     string     `json:"state"`
	Stdin     bool       `json:"stdin"`
	StartedAt time.Time  `json:"started_at"`
	EndedAt   *time.Time `json:"ended_at,omitempty"`
	Exit      *exitJSON  `json:"exit,omitempty"`
	Output    outputJSON `json:"output"`

	Terminal *terminalJSON `json:"terminal,omitempty"`
}

type terminalJSON struct {
	Rows int    `json:"rows"`
	Cols int    `json:"cols"`
	Term string `json:"term"`
}

type exitJSON struct {
	Code   int    `json:"code"`
	Signal string `json:"signal,omitempty"`
	Reason string `json:"reason"`
}

type outputJSON struct {
	Start  int64 `json:"start"`
	End    int64 `json:"end"`
	Stdout int64 `json:"stdout_bytes"`
	Stderr int64 `json:"stderr_bytes"`
	Pty    int64 `json:"pty_bytes"`
	Closed bool  `json:"closed"`
}

func processView(p nestbox.Process) processJSON {
	v := processJSON{
		ID: p.ID.String(), PID: p.PID, Tag: p.Tag, Cmd: p.Cmd, Args: p.Args, ArgsCut: p.ArgsCut, Cwd: nestbox.PathText(p.Cwd), User: p.User,
		State: "running", Stdin: p.Stdin, StartedAt: p.StartedAt,
		Output: outputJSON{p.Output.Start, p.Output.End, p.Output.Stdout, p.Output.Stderr, p.Output.Pty, p.Output.Closed},
	}
	if t := p.Terminal; t != nil {
		v.Terminal = &terminalJSON{t.Rows, t.Cols, t.Term}
	}
	if p.Exit != nil {
		v.State, v.EndedAt = "exited", optional(p.Exit.At)
		v.Exit = &exitJSON{p.Exit.Code, p.Exit.Signal, string(p.Exit.Reason)}
	}
	return v
}

// ending describes in a few words how a process ended.
func ending(e nestbox.Exit) string {
	s := fmt.Sprintf("exited %d", e.Code)
	if e.Signal != "" {
		s = "ended by " + e.Signal
	}
	switch e.Reason {
	case nestbox.ReasonTimeout, nestbox.ReasonIdle, nestbox.ReasonOOM, nestbox.ReasonKilled:
		s += " (" + string(e.Reason) + ")"
	}
	return s
}
