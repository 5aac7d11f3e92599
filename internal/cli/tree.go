package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// systemProcessJSON is a process of a tree as the API shows it.
type systemProcessJSON struct {
	PID         int        `json:"pid"`
	PPID        int        `json:"ppid"`
	Process     string     `json:"process,omitempty"`
	User        string     `json:"user"`
	State       string     `json:"state"`
	Cmd         string     `json:"cmd"`
	CPUMS       int64      `json:"cpu_ms"`
	MemoryBytes int64      `json:"memory_bytes"`
	Ports       []portJSON `json:"ports,omitempty"`
}

type portJSON struct {
	Port    uint16 `json:"port"`
	Address string `json:"address"`
}

func systemProcessView(p nestbox.SystemProcess) systemProcessJSON {
	v := systemProcessJSON{
		PID: p.PID, PPID: p.PPID, User: p.User, State: p.State, Cmd: p.Cmd, CPUMS: p.CPU.Milliseconds(), MemoryBytes: p.Memory,
	}
	if p.Process != 0 {
		v.Process = p.Process.String()
	}
	for _, port := range p.Ports {
		v.Ports = append(v.Ports, portJSON{port.Port, port.Address.String()})
	}
	return v
}

// printTree prints all processes of a capsule, each below its parent.
func (a *app) printTree(ctx context.Context, capsule *client.Capsule) error {
	tree, err := capsule.Processes.Tree(ctx)
	if err != nil {
		return err
	}
	if a.json {
		views := make([]systemProcessJSON, len(tree))
		for i, p := range tree {
			views[i] = systemProcessView(p)
		}
		return a.printJSON(views)
	}
	tags := map[nestbox.ProcessID]string{}
	procs, err := capsule.Processes.List(ctx, true)
	if err != nil {
		return err
	}
	for _, p := range procs {
		tags[p.ID] = p.Tag
	}
	t := a.table("PID", "OF", "USER", "STATE", "CPU", "MEMORY", "PORTS", "COMMAND")
	byParent(tree, func(p nestbox.SystemProcess, depth int) {
		of := "-"
		if p.Process != 0 {
			of = tags[p.Process]
		}
		t.row(strconv.Itoa(p.PID), of, p.User, p.State, roughly(p.CPU), fmt.Sprintf("%.1f MB", float64(p.Memory)/1e6),
			portList(p.Ports), strings.Repeat("  ", min(depth, 20))+cutText(p.Cmd, maxCommandLine))
	})
	return t.flush()
}

// byParent visits processes in the order of their PIDs, each followed by its children.
func byParent(tree []nestbox.SystemProcess, visit func(p nestbox.SystemProcess, depth int)) {
	children := map[int][]int{}
	known := map[int]bool{}
	for i, p := range tree {
		children[p.PPID] = append(children[p.PPID], i)
		known[p.PID] = true
	}
	var below func(i, depth int)
	below = func(i, depth int) {
		p := tree[i]
		if !known[p.PID] {
			return // visited: what a capsule says may go round in circles
		}
		known[p.PID] = false
		visit(p, depth)
		for _, child := range children[p.PID] {
			below(child, depth+1)
		}
	}
	for i, p := range tree {
		if !known[p.PPID] || p.PPID == p.PID {
			below(i, 0)
		}
	}
	for i := range tree {
		below(i, 0)
	}
}

// portList shows each port once, and its address only if it is not any.
func portList(ports []nestbox.ListeningPort) string {
	var out []string
	for _, p := range ports {
		text := strconv.Itoa(int(p.Port))
		if !p.Address.IsUnspecified() {
			text = p.Address.String() + ":" + text
			if p.Address.Is6() {
				text = "[" + p.Address.String() + "]:" + strconv.Itoa(int(p.Port))
			}
		}
		if !slices.Contains(out, text) {
			out = append(out, text)
		}
	}
	if len(out) == 0 {
		return "-"
	}
	return strings.Join(out, ",")
}
