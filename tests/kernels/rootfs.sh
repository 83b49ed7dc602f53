#!/bin/bash
# Guest root file system; the only part that needs root.
#   rootfs.sh base  OUT.tar.zst SUITE MIRROR KEYRING PACKAGE,PACKAGE,...   a Debian tree
#   rootfs.sh image OUT.img BASE.tar.zst REQUIREMENTS CA_BUNDLE            ext4 image: the tree + /opt/ebfw (venv)
# PIP_* and *_proxy variables of the caller reach pip. Nothing is mounted in the caller's namespace, and the work
# folder beside OUT goes away in every case. Not its job: choosing suite, mirror and packages (images.py does).
set -euo pipefail
# debootstrap mounts /proc in the tree and starts many processes; in namespaces of its own neither can outlive
# this script, however it ends.
if [ -z "${EBFW_ROOTFS_NS:-}" ]; then
    EBFW_ROOTFS_NS=1 exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi
trap 'exit 130' INT TERM
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
umask 022
what=$1 out=$2
work=$(mktemp -d "$(dirname "$out")/rootfs.XXXXXX")
cleanup() { umount -R -l "$work/root/proc" "$work/root/sys" 2>/dev/null || true; rm -rf --one-file-system "$work"; }
trap cleanup EXIT
root=$work/root

case $what in
base)
    suite=$3 mirror=$4 keyring=$5 packages=$6
    debootstrap --variant=minbase --arch=amd64 --keyring="$keyring" --include="$packages" "$suite" "$root" "$mirror"
    umount -R -l "$root/proc" "$root/sys" 2>/dev/null || true
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
    # The machine's own names must not travel into the image.
    : >"$root/etc/resolv.conf"
    echo guest >"$root/etc/hostname"
    printf '127.0.0.1 localhost guest\n::1 localhost\n' >"$root/etc/hosts"
    tar -C "$root" --one-file-system -c . | zstd -q -3 -T0 -o "$out"
    ;;
image)
    base=$3 requirements=$4 ca=$5
    mkdir "$root"
    zstd -q -d -c "$base" | tar -C "$root" -x
    cp "$requirements" "$root/tmp/requirements.txt"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    cp /etc/hosts "$root/tmp/hosts" && mv "$root/etc/hosts" "$root/tmp/hosts.guest" && mv "$root/tmp/hosts" "$root/etc/hosts"
    # Some of these would override PIP_CERT with a path that means another file in the tree.
    unset REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR
    [ -s "$ca" ] && cp "$ca" "$root/tmp/ca.pem" && export PIP_CERT=/tmp/ca.pem
    chroot "$root" /usr/bin/python3 -m venv --system-site-packages /opt/ebfw
    chroot "$root" /opt/ebfw/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --root-user-action=ignore \
        -r /tmp/requirements.txt
    chroot "$root" /opt/ebfw/bin/pip list --disable-pip-version-check --format=freeze >"$work/freeze"
    : >"$root/etc/resolv.conf"
    mv "$root/tmp/hosts.guest" "$root/etc/hosts"
    rm -rf "$root"/tmp/* "$root"/root/.cache
    # 5.10 does not know orphan_file, and crc32c for metadata_csum is a module there.
    mb=$(($(du -sm "$root" | cut -f1) * 5 / 4 + 512))
    mke2fs -q -t ext4 -O ^has_journal,^metadata_csum,^orphan_file -E lazy_itable_init=1 -d "$root" "$out" "${mb}M"
    mv "$work/freeze" "$(dirname "$out")/python.txt"
    chown --reference="$(dirname "$out")" "$(dirname "$out")/python.txt"
    ;;
*)
    echo "rootfs.sh: unknown task $what" >&2
    exit 2
    ;;
esac
chown --reference="$(dirname "$out")" "$out"
