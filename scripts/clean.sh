#!/usr/bin/env bash
# Delete everything make has made. `make clean` has unmounted before.
set -euo pipefail
cd "$(dirname "$0")/.."
# What root has left is in run/ and in caches of the tests.
scripts/as_root rm -rf --one-file-system run build dist ./*.egg-info bench/results/{quick,tiny} .venv .*_cache .hypothesis
scripts/as_root find . -name __pycache__ -prune -exec rm -rf {} +
