# After a cut in the middle of the first start; then one in the middle of
# creating and destroying.
. ./lib.sh
healthy
C=$(nestbox capsule create)
is "user" "$(nestbox exec -u user "$C" -- id -un)" user
is "python" "$(nestbox exec "$C" -- python3 -c 'print(6*7)')" 42
for _ in 1 2 3; do
  while X=$(nestbox capsule create 2>/dev/null); do echo "$X" >>/root/answered; sync /root/answered; nestbox capsule rm "$X" >/dev/null; done &
done
busy() { [[ $(wc -l </root/answered) -gt 12 ]]; }
within 300 busy
echo "@@ cut"
sleep 600
