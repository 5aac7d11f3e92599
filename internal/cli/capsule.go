package cli

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newCapsule(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "capsule", Short: "Create, list and destroy capsules", Args: cobra.NoArgs, RunE: help}
	cmd.AddCommand(newCapsuleCreate(a), newCapsuleList(a), newCapsuleGet(a), newCapsuleRemove(a))
	return cmd
}

func help(cmd *cobra.Command, _ []string) error { return cmd.Help() }

func newCapsuleCreate(a *app) *cobra.Command {
	var req nestbox.CapsuleSpec
	var timeout time.Duration
	var network networkFlags
	var env envFlags
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a capsule and print its id",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if req.TimeoutSec, err = wholeSeconds("timeout", timeout); err != nil {
				return err
			}
			if req.Network, err = network.policy(cmd); err != nil {
				return err
			}
			if req.Env, err = env.read(a.LookupEnv); err != nil {
				return err
			}
			capsule, err := c.Capsules.Create(cmd.Context(), req)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(capsuleView(capsule.Info))
			}
			return a.println(capsule.ID)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Template, "template", "", "what to start from (default "+nestbox.TemplateMinimal+")")
	f.StringVar(&req.Name, "name", "", "one that stands for the id in all commands, and no other live capsule has")
	f.StringVar(&req.Hostname, "hostname", "", "as programs see it (default the id)")
	env.add(f)
	f.IntVar(&req.Resources.VCPUs, "vcpus", 0, "virtual CPUs (default 1)")
	f.IntVar(&req.Resources.MemoryMB, "memory", 0, "memory in MiB (default 512)")
	f.IntVar(&req.Resources.DiskMB, "disk", 0, "disk in MiB (default 5120)")
	f.IntVar(&req.Resources.PidsMax, "pids", 0, "most processes and threads at a time (default 4096)")
	f.DurationVar(&timeout, "timeout", 0, "end it after so long without activity (default never)")
	network.add(f)
	f.StringToStringVar(&req.Metadata, "metadata", nil, "notes of your own, key=value")
	return cmd
}

// wholeSeconds rounds a duration up to what the API can take.
func wholeSeconds(name string, d time.Duration) (int, error) {
	if d < 0 {
		return 0, nestbox.Errorf(nestbox.CodeInvalid, "--%s is negative", name)
	}
	return int((d + time.Second - 1) / time.Second), nil
}

func newCapsuleList(a *app) *cobra.Command {
	var all bool
	var metadata map[string]string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List capsules, newest first",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			views := []capsuleJSON{}
			for capsule, err := range c.Capsules.List(cmd.Context(), client.ListCapsules{All: all, Metadata: metadata}) {
				if err != nil {
					return err
				}
				views = append(views, capsuleView(capsule.Info))
			}
			if a.json {
				return a.printJSON(views)
			}
			t := a.table("CAPSULE", "NAME", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "CREATED")
			for _, v := range views {
				t.row(v.ID, orDash(v.Name), v.Status, v.Template, strconv.Itoa(v.VCPUs), fmt.Sprintf("%d MiB", v.MemoryMB), stamp(v.CreatedAt))
			}
			return t.flush()
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those that stopped or failed")
	cmd.Flags().StringToStringVar(&metadata, "metadata", nil, "only those that have this, key=value, all of it")
	return cmd
}

func newCapsuleGet(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "get <capsule>",
		Short:             "Show one capsule, also one that stopped",
		Args:              usual,
		ValidArgsFunction: a.completeCapsule,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			id, err := resolve(cmd.Context(), c, args[0], true)
			if err != nil {
				return err
			}
			capsule, err := c.Capsules.Get(cmd.Context(), id)
			if err != nil {
				return err
			}
			v := capsuleView(capsule.Info)
			if a.json {
				return a.printJSON(v)
			}
			return a.printCapsule(v)
		},
	}
}

func (a *app) printCapsule(v capsuleJSON) error {
	t := a.table()
	t.row("id", v.ID)
	if v.Name != "" {
		t.row("name", v.Name)
	}
	if v.Hostname != "" {
		t.row("hostname", v.Hostname)
	}
	t.row("status", v.Status)
	if v.Reason != "" {
		t.row("reason", v.Reason)
	}
	if v.Unresponsive != nil {
		t.row("unresponsive", "its daemon has not answered since "+stamp(v.Unresponsive.Since))
	}
	t.row("template", v.Template)
	t.row("vcpus", strconv.Itoa(v.VCPUs))
	t.row("memory", fmt.Sprintf("%d MiB", v.MemoryMB))
	t.row("disk", fmt.Sprintf("%d MiB", v.DiskMB))
	t.row("pids", strconv.Itoa(v.PidsMax))
	t.row("timeout", orNever(v.TimeoutSec))
	t.row("network", inWords(v.Network))
	for _, p := range v.Ports {
		t.row("port", strconv.Itoa(int(p.Port))+" "+p.words())
	}
	t.row("created", stamp(v.CreatedAt))
	if v.StartedAt != nil {
		t.row("started", stamp(*v.StartedAt))
	}
	if v.LastActiveAt != nil {
		t.row("last active", stamp(*v.LastActiveAt))
	}
	for _, name := range v.EnvNames {
		t.row("env", name)
	}
	for _, k := range sortedKeys(v.Metadata) {
		t.row("metadata", k+"="+v.Metadata[k])
	}
	return t.flush()
}

func orNever(seconds int) string {
	if seconds == 0 {
		return "never"
	}
	return (time.Duration(seconds) * time.Second).String()
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

func newCapsuleRemove(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "rm <capsule>…",
		Short:             "Destroy capsules and everything in them",
		Args:              usual,
		ValidArgsFunction: a.completeCapsules,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			removed := []string{}
			err = forEach(args, func(arg string) error {
				id, err := resolve(cmd.Context(), c, arg, false)
				if err == nil {
					err = c.Capsules.Destroy(cmd.Context(), id)
				}
				if err != nil {
					return err
				}
				removed = append(removed, id)
				if a.json {
					return nil
				}
				return a.println(id)
			})
			if a.json {
				err = errors.Join(a.printJSON(removed), err)
			}
			return err
		},
	}
}

// resolve returns the id of the capsule of a name, or else of the one whose id begins with
// prefix, with or without its cl-. A whole id is not looked up. all searches stopped ones
// too.
func resolve(ctx context.Context, c *client.Client, prefix string, all bool) (string, error) {
	if nestbox.ValidID(nestbox.PrefixCapsule, prefix) {
		return prefix, nil
	}
	if nestbox.ValidCapsuleName(prefix) {
		capsule, err := c.Capsules.Get(ctx, prefix)
		if err == nil {
			return capsule.ID, nil
		}
		if nestbox.CodeOf(err) != nestbox.CodeNotFound {
			return "", err
		}
	}
	want := nestbox.PrefixCapsule + strings.TrimPrefix(prefix, nestbox.PrefixCapsule)
	if prefix == "" || !plausiblePrefix(want) {
		return "", nestbox.Errorf(nestbox.CodeInvalid, "%q is neither the name nor the id of a capsule, or the beginning of one", prefix)
	}
	found := ""
	for capsule, err := range c.Capsules.List(ctx, client.ListCapsules{All: all}) {
		switch {
		case err != nil:
			return "", err
		case !strings.HasPrefix(capsule.ID, want):
		case found != "":
			return "", nestbox.Errorf(nestbox.CodeInvalid, "%q is the beginning of more than one capsule's id: %s, %s, …", prefix, found, capsule.ID)
		default:
			found = capsule.ID
		}
	}
	if found == "" {
		return "", nestbox.Errorf(nestbox.CodeNotFound, "no capsule has the name %[1]q, or an id that begins so (nestbox capsule ls lists them)", prefix)
	}
	return found, nil
}

// plausiblePrefix reports whether an id may begin so: whether it can be filled
// up to an id.
func plausiblePrefix(s string) bool {
	const idBytes = len(nestbox.PrefixCapsule) + 25
	return len(s) < idBytes && nestbox.ValidID(nestbox.PrefixCapsule, s+strings.Repeat("0", idBytes-len(s)))
}

// capsule returns a handle for an argument that names a capsule.
func (a *app) capsule(ctx context.Context, arg string) (*client.Capsule, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	id, err := resolve(ctx, c, arg, false)
	if err != nil {
		return nil, err
	}
	return c.Capsule(id), nil
}
