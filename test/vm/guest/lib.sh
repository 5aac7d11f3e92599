# Sourced by the scenarios' steps, which run as root in the machine, in /job.
set -eu -o pipefail
export NESTBOX_URL=http://127.0.0.1:8080 NESTBOX_API_KEY_FILE=/var/lib/nestbox/api-key
PATH=/job/bin:$PATH

say() { echo "$(cut -d' ' -f1 /proc/uptime) s: $*"; }

fail() {
  echo "FAIL: $*"
  journalctl -b -u nestbox --no-pager -n 30 | cut -c1-300 || true
  exit 1
}
trap 'fail "line $LINENO of job.sh: $BASH_COMMAND"' ERR
set -E

# is WHAT GOT WANT
is() { [[ $2 == "$3" ]] || fail "$1: got '$2', want '$3'"; say "ok: $1"; }

# within SECONDS COMMAND...: until it succeeds.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "not within its time: $*"
    sleep 0.2
  done
}

install_service() {
  install -m 755 bin/nestbox /usr/local/bin/nestbox
  cp nestbox.service /etc/systemd/system/
  systemctl daemon-reload
  systemctl enable -q nestbox
}

healthy() { within 120 curl -sf "$NESTBOX_URL/health"; }

state() { nestbox capsule get --json "$1" | jq -r .status; }
reason() { nestbox capsule get --json "$1" | jq -r '.reason // ""'; }
