#!/usr/bin/env bash
# Install imgfs for the whole machine: a virtual environment in /opt/imgfs, the command, its manual page, the units,
# the helper for mount(8). `make install-system` has made .venv before.
set -euo pipefail
cd "$(dirname "$0")/.."
as_root=scripts/as_root
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

# Built by whoever runs this, so that nothing of root's is left in the checkout, and without leavings of an older build.
rm -rf build
.venv/bin/pip wheel --quiet --no-deps --wheel-dir "$wheels" .
$as_root "${PYTHON:-python3}" -m venv --clear /opt/imgfs
$as_root /opt/imgfs/bin/pip install --quiet --disable-pip-version-check "$wheels"/imgfs-*.whl
$as_root ln -sf /opt/imgfs/bin/imgfs /usr/local/bin/imgfs
$as_root install -D -m 644 systemd/imgfs@.service /usr/local/lib/systemd/system/imgfs@.service
$as_root install -D -m 644 systemd/imgfs-scrub@.service /usr/local/lib/systemd/system/imgfs-scrub@.service
$as_root install -D -m 644 systemd/imgfs-scrub@.timer /usr/local/lib/systemd/system/imgfs-scrub@.timer
$as_root install -D -m 755 systemd/mount.fuse.imgfs /sbin/mount.fuse.imgfs
$as_root install -D -m 644 docs/imgfs.1 /usr/local/share/man/man1/imgfs.1
if [ -d /run/systemd/system ]; then $as_root systemctl daemon-reload; fi
echo "Installed. systemd/README.md says how to mount a store at boot."
