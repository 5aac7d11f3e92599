# The tests that meet the kernel, on control groups v2.
. ./lib.sh
export NESTBOX_TEST_BIN=/job/bin
is "control groups" "$(stat -fc %T /sys/fs/cgroup)" cgroup2fs
say "$(uname -sr), $(systemctl --version | head -1)"

failed=()
while read -r package flags; do
  [[ -n $package && $package != '#'* ]] || continue
  begin=$SECONDS
  # shellcheck disable=SC2086
  if (cd "$package" && ./package.test -test.v -test.timeout=40m $flags) </dev/null >/tmp/log 2>&1; then
    result=ok
  else
    result=FAIL
    failed+=("$package")
    grep -v -E '^ *(=== |--- PASS|ok )' /tmp/log | cut -c1-300 | head -80 || true
  fi
  # A test that says nothing is one that did not run.
  passed=$(grep -c -e '^--- PASS' /tmp/log || true)
  ((passed > 0)) || failed+=("$package: nothing ran")
  say "$result $package: $passed passed, $(grep -c -e '--- SKIP' /tmp/log || true) skipped, $((SECONDS - begin)) s"
  grep -A1 -e '--- SKIP' /tmp/log || true
done <packages
is "failed packages" "${failed[*]-}" ""
is "control groups left" "$(find /sys/fs/cgroup -path '*nestbox/*' -type d)" ""
