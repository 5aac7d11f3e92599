package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// OnThread runs f on a thread of its own, which ends with f. So f may change
// what belongs to a thread (namespaces, control groups) and leave it changed.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() != unix.Getpid() {
			done <- f()
			return
		}
		// The first thread cannot end, and /proc/self shows its view as that of
		// the whole process. While it is held here, f runs on another one.
		defer runtime.UnlockOSThread()
		done <- OnThread(f)
	}()
	return <-done
}

// In runs f on a thread of its own in the namespace at a path. Sockets that f makes
// stay in the namespace.
func In(path string, f func() error) error {
	return OnThread(func() error {
		ns, err := vns.GetFromPath(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := vns.Set(ns); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		return f()
	})
}

func threadNet() string { return fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()) }

// makeNamed moves the thread into a new network namespace and names it.
func makeNamed(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := unix.Mount(threadNet(), path, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	for name, value := range map[string]string{
		// A namespace inherits forwarding from the host's.
		"ipv4/ip_forward": "0",
		// For links made from here on. With conf/all the loopback would lose
		// ::1, on which programs in the sandbox listen.
		"ipv6/conf/default/disable_ipv6": "1",
	} {
		err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	return nil
}

func removeNamed(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // EINVAL: nothing is mounted
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// connect makes the veth pair between the thread's namespace and the named one.
func connect(innerPath string) error {
	innerNS, err := vns.GetFromPath(innerPath)
	if err != nil {
		return err
	}
	defer innerNS.Close()
	outer, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer outer.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = OuterLink
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: guestLink, PeerNamespace: netlink.NsFd(innerNS)}
	if err := outer.LinkAdd(veth); err != nil {
		return fmt.Errorf("add the veth pair: %w", err)
	}
	if err := bringUp(outer, OuterLink, OuterAddr.String()); err != nil {
		return err
	}
	in, err := netlink.NewHandleAt(innerNS)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := bringUp(in, "lo", ""); err != nil {
		return err
	}
	return bringUp(in, guestLink, GuestAddr.String())
}

func bringUp(h *netlink.Handle, name, addr string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if addr != "" {
		a, err := netlink.ParseAddr(fmt.Sprintf("%s/%d", addr, linkBits))
		if err != nil {
			return err
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("give %s its address: %w", name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}
