#!/usr/bin/env bash
# Unmount what run.sh mounted, as far as it is mounted. The loop device goes with the disk.
set -euo pipefail
cd "$(dirname "$0")/.."

mounted() {
    findmnt --mountpoint "$1" >/dev/null
}

# Returns when the store is closed, so that nobody uses the disk any more.
if mounted run/mnt; then scripts/as_root .venv/bin/imgfs umount run/mnt; fi
if mounted run/disk; then scripts/as_root umount run/disk; fi
