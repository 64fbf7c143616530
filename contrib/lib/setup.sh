# Sourced by contrib/demo and contrib/test. Installs what is missing, and only that.
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

# need_environment DIRECTORY PYTHON EXTRA: a virtual environment with kmsfs and an extra in it.
need_environment() {
    local directory=$1 python=$2 extra=$3 stamp wanted
    stamp="$directory/.kmsfs-installed"
    wanted="$extra $(sha256sum pyproject.toml) $("$python" -V)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$directory/bin/python" -c 'import pyfuse3'; then
        return
    fi
    say "installing Python packages into $directory"
    [ -x "$directory/bin/python" ] && [ "$("$directory/bin/python" -V)" = "$("$python" -V)" ] ||
        "$python" -m venv --clear "$directory"
    "$directory/bin/python" -m pip install -q --disable-pip-version-check -e ".[$extra]"
    printf '%s' "$wanted" >"$stamp"
}

need_fuse() {
    [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || fail "/dev/fuse is missing: load the fuse module, or pass the device through"
}
