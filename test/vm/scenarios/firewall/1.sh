# A firewall that drops all but loopback takes nothing from capsules.
. ./lib.sh
install_service
nft -f - <<'X'
table inet closed {
  chain input { type filter hook input priority 0; policy drop; iif lo accept; }
  chain forward { type filter hook forward priority 0; policy drop; }
  chain output { type filter hook output priority 0; policy drop; oif lo accept; }
}
X
systemctl start nestbox
healthy
C=$(nestbox capsule create)
is "exec" "$(nestbox exec "$C" -- echo through)" through
nestbox exec -d --tag web "$C" -- python3 -u -m http.server 8000
within 60 curl -sf "$(nestbox url "$C" 8000)"
say "ok: a port of a capsule"
nestbox capsule rm "$C" >/dev/null
is "nothing left" "$(find /sys/fs/cgroup -path '*nestbox/*' -name 'cl-*')" ""
