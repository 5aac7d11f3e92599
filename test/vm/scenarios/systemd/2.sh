# After an orderly shutdown and boot.
. ./lib.sh
healthy
E=$(</root/capsule)
ended() { [[ $(state "$E") == error ]]; }
within 30 ended
say "ok: the capsule is $(state "$E"): $(reason "$E")"
[[ -n $(reason "$E") ]] || fail "no reason"
is "control groups left" "$(find /sys/fs/cgroup -path '*nestbox/*' -name 'cl-*')" ""
is "layers left" "$(ls /var/lib/nestbox/sandboxes/layers)" ""
nestbox capsule rm "$E" >/dev/null
C=$(nestbox capsule create); is "a new one" "$(nestbox exec "$C" -- echo alive)" alive
nestbox capsule rm "$C" >/dev/null
