# Nothing of them is left, and what was answered is known.
. ./lib.sh
healthy
none_live() { [[ $(nestbox capsule ls -a --json | jq '[.[] | select(.status != "error" and .status != "stopped")] | length') == 0 ]]; }
within 60 none_live
for x in $(</root/answered); do
  state "$x" >/dev/null || fail "capsule $x was answered and is not known"
done
say "ok: $(wc -l </root/answered) capsules that were answered are known"
none_left() { [[ -z $(ls /var/lib/nestbox/sandboxes/layers /var/lib/nestbox/host/capsules | grep cl-) ]]; }
within 60 none_left
is "the disk's errors" "$(journalctl -b -k --no-pager | grep -c 'EXT4-fs error' || true)" 0
C=$(nestbox capsule create)
is "a new one" "$(nestbox exec -u user "$C" -- id -un)" user
nestbox capsule rm "$C" >/dev/null
