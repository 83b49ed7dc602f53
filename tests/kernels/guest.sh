#!/bin/bash
# Process 1 of a guest, on its root file system. In: /ebfw/{checkout,args,env} (from the payload), args and env as
# NUL-terminated words. Out: lines with "@@" and pytest's output on ttyS1, /ebfw/results as a tar on /dev/vdd, power off.
# Not its job: judging the result (run.py does).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb
stty -F /dev/ttyS1 raw
exec </dev/null >/dev/ttyS1 2>&1
# A line of its own even where pytest was ended in the middle of one.
say() { local up; read -r up _ </proc/uptime; printf '\n@@ %s %s\n' "$up" "$*"; }
say userspace "$(uname -r)"

mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm /run/netns /run/lock
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
chmod 1777 /tmp /dev/shm
ln -sfn /proc/self/fd /dev/fd
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount -t securityfs securityfs /sys/kernel/security
# Like systemd does: mounts made by tests and agents propagate, controllers are there for child cgroups.
mount --make-rshared /
for c in cpu io memory pids; do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control; done 2>/dev/null
hostname guest
ip link set lo up
sysctl -q kernel.core_pattern=/dev/null

mkdir -p /ebfw/results/out
mapfile -d '' -t envs </ebfw/env
mapfile -d '' -t args </ebfw/args
limit=600 each=600
for e in "${envs[@]}"; do
    case $e in
    EBFW_GUEST_LIMIT=*) limit=${e#*=} ;;
    EBFW_GUEST_TEST_LIMIT=*) each=${e#*=} ;;
    *) export "${e?}" ;;
    esac
done
export EBFW_TEST_OUT=/ebfw/results/out PYTHONUNBUFFERED=1
cd /ebfw/checkout || say no checkout

# The host takes silence for a dead kernel; one long test is not silence. A NUL spoils no line of pytest's.
(while sleep 20; do printf '\0'; done) &
heart=$!
say pytest
# pytest's own limit ends before the host's, so that a hung test still gives a log.
timeout -k 10 "$limit" /opt/ebfw/bin/python -m pytest -v -rfEs --color=no -p no:cacheprovider \
    -o timeout="$each" --junitxml=/ebfw/results/junit.xml "${args[@]}" 2>&1 | tee /ebfw/results/pytest.log
rc=${PIPESTATUS[0]}
kill "$heart"
dmesg >/ebfw/results/dmesg.log
tar -c -f /dev/vdd -C /ebfw/results . || say results do not fit their disk
sync
say done "$rc"
# The serial line must drain before power goes off.
sleep 0.5
echo o >/proc/sysrq-trigger
sleep 100
