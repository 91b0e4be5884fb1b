#!/usr/bin/env bash
# A root of Debian 12 with systemd, a user fedsp, and fedsp in /opt/fedsp, installed from a wheelhouse without a network.
#
#     clean_root.sh ROOT WHEELHOUSE        (as the root user; the wheelhouse is made with Python 3.11, which Debian 12 has)
set -euo pipefail
root=${1:?usage: clean_root.sh ROOT WHEELHOUSE}
wheelhouse=$(realpath "${2:?usage: clean_root.sh ROOT WHEELHOUSE}")
here=$(dirname "$(realpath "$0")")
refuse() { echo "clean_root.sh: $1" >&2; exit 2; }
[ "$(id -u)" = 0 ] || refuse "a root is made by the root user"
command -v debootstrap >/dev/null || refuse "debootstrap is not installed: apt-get install debootstrap"
[ -f "$wheelhouse/requirements.txt" ] || refuse "$wheelhouse holds no requirements.txt: \`make wheelhouse\` makes one"
[ ! -e "$root" ] || refuse "$root is in use: give a new folder"
debootstrap --variant=minbase --include=python3,python3-venv,systemd,systemd-sysv bookworm "$root" >"$root.log" 2>&1 \
    || refuse "debootstrap did not make $root (see $root.log): $(tail -n 1 "$root.log")"
chroot "$root" useradd --system --home-dir /var/lib/fedsp --create-home fedsp
unshare --mount --net sh -ec '
    mount -t tmpfs tmpfs "$1/tmp" && mkdir "$1/tmp/wheelhouse" && mount --bind "$2" "$1/tmp/wheelhouse"
    cp "$3" "$1/tmp/install.sh" && chroot "$1" sh /tmp/install.sh /tmp/wheelhouse /opt/fedsp' \
    sh "$root" "$wheelhouse" "$here/../deploy/containers/install.sh"
