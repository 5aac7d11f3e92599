package gvisor

import (
	"cmp"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/nestbox/nestbox/internal/durable"
)

// Crash logs are kept when the rest of a sandbox is removed: longer than ended
// capsules are listed, but not for ever.
const (
	crashFor  = 30 * 24 * time.Hour
	crashMost = 100     // logs
	crashSize = 1 << 20 // bytes of each: its beginning, which says what happened
)

// keepCrashLog keeps what gVisor wrote when it crashed, and returns its path below
// the state directory; "" if it has not crashed.
func (d *Driver) keepCrashLog(id string) string {
	f, err := os.Open(filepath.Join(d.bundle(id), panicFile))
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, crashSize))
	if err != nil || len(text) == 0 {
		return ""
	}
	path := filepath.Join(d.crashes(), id+".log")
	d.cfg.Log.Error("gVisor crashed", "capsule", id, "log", path)
	if err := durable.WriteFile(path, text, 0o600); err != nil {
		d.cfg.Log.Error("keeping the log of a crash", "capsule", id, "error", err)
		return panicFile + " (which could not be kept)"
	}
	d.dropCrashLogs()
	return filepath.Join(filepath.Base(d.cfg.StateDir), filepath.Base(d.crashes()), filepath.Base(path))
}

// dropCrashLogs removes those that are old, and the oldest of too many.
func (d *Driver) dropCrashLogs() {
	entries, err := os.ReadDir(d.crashes())
	if err != nil {
		d.cfg.Log.Warn("looking for old logs of crashes", "error", err)
		return
	}
	var logs []os.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			logs = append(logs, info)
		}
	}
	slices.SortFunc(logs, func(a, b os.FileInfo) int { return cmp.Compare(b.ModTime().UnixNano(), a.ModTime().UnixNano()) })
	for i, info := range logs {
		if i >= crashMost || time.Since(info.ModTime()) > crashFor {
			_ = os.Remove(filepath.Join(d.crashes(), info.Name())) // the next time, if not now
		}
	}
}
