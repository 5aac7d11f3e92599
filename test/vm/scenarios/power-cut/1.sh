# The power goes as soon as the first capsule has answered.
. ./lib.sh
install_service
sync
systemctl start nestbox
healthy
C=$(nestbox capsule create)
nestbox exec -u user "$C" -- id -un
nestbox capsule create >/dev/null
nestbox key create cut --dir /var/lib/nestbox >/dev/null
say "capsules: $(nestbox capsule ls -a --json | jq -c '[.[].id]')"
echo "@@ cut"
sleep 600
