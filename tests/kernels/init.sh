#!/bin/busybox sh
# First process of a guest (initramfs). In: /m/* modules with /m/order, disks vda (root, ext4, thrown away),
# vdb (this kernel's modules), vdc (payload, a raw tar). Out: control to guest.sh on the guest's root.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
for m in $($B cat /m/order); do $B insmod "/m/$m" || echo "insmod $m failed"; done
# virtio disks appear asynchronously after virtio_blk is in.
n=0
while ! [ -b /dev/vdd ] && [ $n -lt 100 ]; do $B sleep 0.1; n=$((n + 1)); done
# A failing step ends this process; the kernel then panics, which ends qemu: the host sees a guest without a result.
set -e
$B mount -t ext4 /dev/vda /root
$B mkdir -p /root/usr/lib/modules /root/ebfw
$B mount -t ext4 -o ro /dev/vdb /root/usr/lib/modules
$B mount -t tmpfs -o mode=755 ebfw /root/ebfw
$B tar -x -f /dev/vdc -C /root/ebfw
for d in dev proc sys; do $B mount --move /$d /root/$d; done
exec $B switch_root /root /bin/bash /ebfw/guest.sh
