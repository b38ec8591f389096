#!/usr/bin/env bash
# Run all tests, as root: they mount file systems and start nginx as www-data. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# What pytest and hypothesis write down belongs to whoever runs this.
[ "$(id -u)" = 0 ] || trap 'scripts/as_root chown -R "$(id -u):$(id -g)" .' EXIT
# In CI no test may be skipped. Under that name pytest would spell out how megabytes differ, for minutes.
export IMGFS_SKIP_NOTHING=${CI-}
unset CI BUILD_NUMBER
# Tests that may not run beside each other share an xdist_group.
scripts/as_root .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
