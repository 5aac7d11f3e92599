package cli

import (
	"bytes"
	"encoding/base64"
	"time"
	"unicode/utf8"

	"github.com/nestbox/nestbox/client"
)

// execJSON collects the output of a command for --json.
type execJSON struct{ stdout, stderr capped }

// maxCaptured is how much output of either kind --json shows, as the API does.
const maxCaptured = 32 << 20

// capped keeps the first maxCaptured bytes of what is written.
type capped struct {
	buf bytes.Buffer
	cut bool
}

func (c *capped) Write(p []byte) (int, error) {
	keep := min(len(p), maxCaptured-c.buf.Len())
	c.cut = c.cut || keep < len(p)
	c.buf.Write(p[:keep])
	return len(p), nil
}

// execView is the result of a command as the API shows it.
type execView struct {
	SandboxID  string `json:"sandbox_id"`
	Cmd        string `json:"cmd"`
	ID         string `json:"id"`
	PID        int    `json:"pid"`
	Tag        string `json:"tag"`
	Stdout     string `json:"stdout"`
	Stderr     string `json:"stderr"`
	ExitCode   int    `json:"exit_code"`
	DurationMS int64  `json:"duration_ms"`
	Encoding   string `json:"encoding"`
	Signal     string `json:"signal,omitempty"`
	Reason     string `json:"reason"`
	Truncated  bool   `json:"truncated,omitempty"`
}

func (e *execJSON) view(capsule string, cmd *client.Cmd, took time.Duration) execView {
	v := execView{
		SandboxID: capsule, Cmd: cmd.Path, ID: cmd.Process.ID.String(), PID: cmd.Process.PID, Tag: cmd.Process.Tag,
		ExitCode: cmd.Exit.Code, Signal: cmd.Exit.Signal, Reason: string(cmd.Exit.Reason),
		DurationMS: took.Milliseconds(), Encoding: "utf-8", Truncated: e.stdout.cut || e.stderr.cut,
	}
	stdout, stderr := e.stdout.buf.Bytes(), e.stderr.buf.Bytes()
	if utf8.Valid(stdout) && utf8.Valid(stderr) {
		v.Stdout, v.Stderr = string(stdout), string(stderr)
		return v
	}
	v.Encoding = "base64"
	v.Stdout = base64.StdEncoding.EncodeToString(stdout)
	v.Stderr = base64.StdEncoding.EncodeToString(stderr)
	return v
}
