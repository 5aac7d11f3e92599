package nestbox_test

import (
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// FuzzParseSelector: what is accepted has one spelling, and names a PID if and
// only if it is all digits.
func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"", "0", "1", "007", "42", "+42", "-1", " 42", "4294967338", "2147483648", "web", "web.1:a@b-c_d", "8080", "proc-0a1b2c3d", "@1", "@", "@0", "@01", "@-1", "@9007199254740991", "@9007199254740992", "a/b", "a\x00b", "٤٢", strings.Repeat("a", 65)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := nestbox.ParseSelector(s)
		if err != nil {
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
			require.Equal(t, nestbox.Selector{}, sel)
			return
		}
		require.Equal(t, s, sel.String())
		digits := strings.Trim(s, "0123456789") == ""
		marked := strings.HasPrefix(s, "@")
		require.Equal(t, marked, sel.ID.Valid())
		require.Equal(t, digits, sel.PID > 0)
		require.Equal(t, !digits && !marked, sel.Tag != "")
		if sel.Tag != "" {
			require.True(t, nestbox.ValidTag(sel.Tag))
		}
	})
}

// FuzzParseSince: an offset is a plain, non-negative decimal number.
func FuzzParseSince(f *testing.F) {
	for _, s := range []string{"", "start", "now", "0", "12", "-1", "+1", "1e3", "0x10", " 1", "9223372036854775807", "9223372036854775808", "NOW", "5m", "-5m", "0s", "2026-01-02T15:04:05Z"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		since, err := nestbox.ParseSince(s)
		switch {
		case err != nil:
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
			require.Equal(t, nestbox.Since{}, since)
		case s == "" || s == "start":
			require.Equal(t, nestbox.Since{}, since)
		case s == "now":
			require.Equal(t, nestbox.Since{Now: true}, since)
		case !since.After.IsZero():
			require.Equal(t, nestbox.Since{After: since.After}, since)
			require.True(t, since.Sought())
		default:
			require.Equal(t, strings.TrimLeft(s, "0"), strings.TrimLeft(strconv.FormatInt(since.Offset, 10), "0"))
			require.False(t, since.Now)
		}
	})
}

// FuzzParseSignal: what is accepted has a name that leads back to it.
func FuzzParseSignal(f *testing.F) {
	for _, s := range []string{"", "SIG", "SIGKILL", "kill", "sigterm", "Hup", "9", "SIGSIGKILL", "SIGRTMIN", "SIGKILL ", "ſIGKILL"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sig, err := nestbox.ParseSignal(s)
		if err != nil {
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
			require.Contains(t, err.Error(), "SIGKILL")
			require.Equal(t, syscall.Signal(0), sig)
			return
		}
		name := nestbox.SignalName(sig)
		require.NotEmpty(t, name)
		if s != "" && s[0] >= '0' && s[0] <= '9' || strings.HasPrefix(s, "+") {
			n, err := strconv.Atoi(s)
			require.NoError(t, err)
			require.EqualValues(t, n, sig)
			return
		}
		require.Equal(t, strings.TrimPrefix(name, "SIG"), strings.TrimPrefix(strings.ToUpper(s), "SIG"))
	})
}

// FuzzValidID: an id is its prefix and 25 lower-case base36 characters.
func FuzzValidID(f *testing.F) {
	id := nestbox.NewID(nestbox.PrefixCapsule)
	for _, s := range []string{"", "cl-", id, id + "\n", strings.ToUpper(id), "team-" + id[3:], id[:len(id)-1], id + "0", "../" + id} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rest, ok := strings.CutPrefix(s, nestbox.PrefixCapsule)
		ok = ok && len(rest) == 25 && strings.Trim(rest, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
		require.Equal(t, ok, nestbox.ValidID(nestbox.PrefixCapsule, s))
	})
}
