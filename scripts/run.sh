#!/usr/bin/env bash
# Mount a store with sample photos at run/mnt. The store lies on an XFS in the file run/disk.xfs; `make stop` keeps it.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
imgfs=$PWD/.venv/bin/imgfs

mounted() {
    findmnt --mountpoint "$1" >/dev/null
}

[ -e /dev/fuse ] || scripts/as_root modprobe fuse

mkdir -p run/disk
if ! mounted run/disk; then
    if [ ! -e run/disk.xfs ]; then
        truncate --size 2G run/disk.xfs
        mkfs.xfs -q run/disk.xfs
    fi
    scripts/as_root mount -o loop run/disk.xfs run/disk ||
        echo "No loop device here: the store goes into run/disk as it is, on $(stat --file-system --format %T run)."
fi
[ -e run/disk/store ] || scripts/as_root "$imgfs" mkfs run/disk/store >/dev/null

# A mount whose daemon is dead is in the table all the same; imgfs clears it.
mounted run/mnt || mkdir -p run/mnt
if ! mounted run/mnt || ! stat --file-system run/mnt >/dev/null 2>&1; then
    scripts/as_root "$imgfs" mount --daemon -o allow_other run/disk/store run/mnt
    scripts/as_root chown "$(id -u):$(id -g)" run/mnt
fi

if [ ! -e run/mnt/photos ]; then
    [ -e run/photos ] || .venv/bin/python scripts/make_photos.py run/photos
    cp --archive run/photos run/mnt/
fi

cat <<END

$(find run/mnt/photos -type f | wc -l) photos are in the store mounted at run/mnt. Try:

  ls -l run/mnt/photos/*                     # it is an ordinary directory
  diff -r run/photos run/mnt/photos          # byte for byte what was copied in
  cp -a YOUR/PHOTOS run/mnt/                 # put in your own
  .venv/bin/imgfs --help                     # import, export, check, ...
  scripts/as_root .venv/bin/imgfs info run/disk/store
  make stop                                  # unmount; make run brings it back
END
