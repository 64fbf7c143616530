# shellcheck shell=bash
# Sourced by contrib/demo, contrib/test and .ci/run. Installs what is missing, and only that.
#
# System packages come from apt, Python packages go into virtual environments in the checkout.
# A second run finds everything in place and does nothing.

KMSFS_PYTHONS="3.11 3.12 3.13"

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        command -v sudo >/dev/null || fail "root is needed for: $* (become root, or install sudo)"
        sudo "$@"
    fi
}

# need_packages PACKAGE...: install the Debian packages that are not there yet.
need_packages() {
    command -v apt-get >/dev/null || fail "this installs with apt: Debian or Ubuntu is needed"
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' ||
            missing+=("$package")
    done
    [ "${#missing[@]}" = 0 ] && return
    say "installing packages: ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        "${missing[@]}" >/dev/null
}

# find_python VERSION: path of a usable interpreter of exactly this version, or nothing.
find_python() {
    local candidate
    for candidate in "python$1" "/usr/bin/python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python3; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        # A pyenv shim exists for versions that are not selected; only running it tells.
        "$candidate" - "$1" 2>/dev/null <<'PY' && printf '%s\n' "$candidate" && return
import sys, sysconfig, venv, ensurepip, pathlib
header = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not ("%d.%d" % sys.version_info[:2] == sys.argv[1] and header.exists()))
PY
    done
}

# need_python: packages for the system's own interpreter and for building pyfuse3.
need_python() {
    need_packages python3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3 \
        ca-certificates
}

# default_python: the first supported interpreter there is.
default_python() {
    local version found
    for version in $KMSFS_PYTHONS; do
        found=$(find_python "$version")
        [ -n "$found" ] && printf '%s\n' "$found" && return
    done
    fail "no Python of $KMSFS_PYTHONS found: Debian 12, Ubuntu 24.04 or later have one"
}

# environment_of VERSION: where its virtual environment is; the default's is .venv.
environment_of() {
    if [ "$(find_python "$1")" = "$(default_python)" ]; then
        echo .venv
    else
        echo ".venv-$1"
    fi
}

# need_environment DIRECTORY PYTHON EXTRA...: a virtual environment with kmsfs and extras in it.
need_environment() {
    local directory=$1 python=$2 wanted extra missing=() log
    shift 2
    wanted="$PWD $("$python" -V) $(sha256sum pyproject.toml)"
    for extra in "$@"; do
        [ "$(cat "$directory/.with-$extra" 2>/dev/null)" = "$wanted" ] || missing+=("$extra")
    done
    [ "${#missing[@]}" = 0 ] && return
    say "installing Python packages into $directory (a few minutes at most)"
    [ -x "$directory/bin/python" ] && [ "$("$directory/bin/python" -V)" = "$("$python" -V)" ] ||
        "$python" -m venv --clear "$directory"
    log=$directory/install.log
    "$directory/bin/python" -m pip install --disable-pip-version-check \
        -e ".[$(IFS=,; echo "$*")]" >"$log" 2>&1 ||
        { cat "$log" >&2; fail "pip could not install the packages"; }
    for extra in "$@"; do
        printf '%s\n' "$wanted" >"$directory/.with-$extra"
    done
}

need_fuse() {
    [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || fail "/dev/fuse is missing: load the fuse module, or pass the device through"
}
