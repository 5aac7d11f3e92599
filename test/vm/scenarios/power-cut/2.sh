# What was answered before the cut is there, nothing half-written is believed;
# then the next cut, in the middle of building the template.
. ./lib.sh
healthy
is "capsules that are remembered" "$(nestbox capsule ls -a --json | jq length)" 2
errors() { [[ $(nestbox capsule ls -a --json | jq '[.[] | select(.status == "error" and .reason != "")] | length') == 2 ]]; }
within 30 errors
say "ok: $(nestbox capsule ls -a --json | jq -r '.[0] | .status + ": " + .reason')"
is "keys" "$(nestbox key ls --dir /var/lib/nestbox | grep -c cut)" 1
is "the disk's errors" "$(journalctl -b -k --no-pager | grep -c 'EXT4-fs error' || true)" 0

C=$(nestbox capsule create)
is "user" "$(nestbox exec -u user "$C" -- id -un)" user
is "empty files of the template" "$(nestbox exec "$C" -- find /etc/passwd /etc/group /etc/ld.so.cache /etc/hosts -size 0)" ""
is "python" "$(nestbox exec "$C" -- python3 -c 'print(6*7)')" 42
for x in $(nestbox capsule ls -a --json | jq -r '.[].id'); do nestbox capsule rm "$x" >/dev/null; done
is "layers left" "$(ls /var/lib/nestbox/sandboxes/layers)" ""

# All anew, and the power goes while the first start is at work.
systemctl stop nestbox
rm -rf /var/lib/nestbox
sync
systemctl start --no-block nestbox
within 60 test -d /var/lib/nestbox/images
echo "@@ cut"
sleep 600
