# The shipped unit: capsules outlive the server however it ends, and systemd
# leaves their limits alone.
. ./lib.sh
install_service
systemctl start nestbox
healthy
C=$(nestbox capsule create --memory 256)
D=$(nestbox capsule create)
nestbox exec -d --tag count "$C" -- sh -c 'i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done'

limits() {
  for c in /sys/fs/cgroup/nestbox/*/cl-*; do
    echo "$(basename "$c") $(cat "$c"/{cpu.max,memory.high,memory.max,memory.oom.group,pids.max} | tr '\n' ' ')"
  done
}
before=$(limits)
say "$before"
is "capsules with limits" "$(wc -l <<<"$before")" 2
grep -q max <<<"$(cut -d' ' -f2 <<<"$before")" && fail "a capsule without a CPU limit"
seen() { nestbox logs "$C" count | tail -1; }
goes_on() { [[ $(seen) -gt $1 ]]; }

n=$(seen); systemctl restart nestbox; healthy; within 60 goes_on "$n"
say "ok: systemctl restart"
systemctl daemon-reload
systemd-run -q --wait -p CPUQuota=20% -p AllowedCPUs=0 true
systemd-run -q --wait -p CPUWeight=20 -p MemoryMax=100M true
systemctl set-property --runtime system.slice CPUWeight=50
systemctl daemon-reexec
is "limits after reload, reexec and other units" "$(limits)" "$before"

n=$(seen)
systemctl stop nestbox
is "sandboxes without a server" "$(pgrep -fc runsc-sandbox)" 2
systemctl start nestbox; healthy; within 60 goes_on "$n"
say "ok: stop and start"

n=$(seen)
kill -9 "$(systemctl show -p MainPID --value nestbox)"
within 60 systemctl is-active nestbox; healthy; within 60 goes_on "$n"
say "ok: kill -9 and Restart=on-failure"
is "limits in the end" "$(limits)" "$before"

is "the other capsule" "$(nestbox exec "$D" -- echo alive)" alive
nestbox capsule rm "$C" "$D" >/dev/null
is "control groups left" "$(find /sys/fs/cgroup -path '*nestbox/*' -name 'cl-*')" ""

E=$(nestbox capsule create); echo "$E" >/root/capsule
say "a capsule that the machine's shutdown meets: $E"
