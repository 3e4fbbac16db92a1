# Sourced by the other scripts: makes sure that there is a Python with everything this project needs, and sets PYTHON.
#
#   setup_environment EXTRA MODULE...     EXTRA: what to install, such as `weights`; MODULE: what must then be there
#
# An environment that is already active and has everything is used as it is. Otherwise .venv is made in the project's
# directory. A stamp, written last, says what it was made from: an interrupted set-up or a changed setup.cfg is noticed
# and set up again. Two first calls at once wait for each other.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STAMP="$PROJECT/.venv/.mtl-stamp"

fail() { echo "error: $*" >&2; exit 1; }

# Presence is looked up, not imported: importing torch and timm takes seconds.
has_modules() {
    "$1" - "${@:2}" 2>/dev/null <<'PY'
import sys
from importlib.util import find_spec

sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))
PY
}

wanted_stamp() { { echo "$1"; cat "$PROJECT/setup.cfg" "$PROJECT/pyproject.toml"; } | sha256sum | cut -d' ' -f1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one and put it on the PATH"
}

install_into_venv() {
    local base
    base=$(find_python) || exit 1
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$base cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv"
    echo "Setting up $PROJECT/.venv; the first time this downloads PyTorch and takes some minutes." >&2
    rm -f "$STAMP"
    # --clear: a half-made environment from an interrupted set-up is not repaired but made anew.
    [ -x "$PROJECT/.venv/bin/pip" ] && "$PROJECT/.venv/bin/pip" --version >/dev/null 2>&1 ||
        "$base" -m venv --clear "$PROJECT/.venv" || fail "$base could not make $PROJECT/.venv"
    "$PROJECT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$PROJECT[$1]" >&2 ||
        fail "pip could not install the project; the lines above say why"
    wanted_stamp "$1" >"$STAMP"
}

setup_environment() {
    local extra=$1
    shift
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_modules python "$@"; then
        PYTHON=$(command -v python)
        return
    fi
    PYTHON="$PROJECT/.venv/bin/python"
    # One set of packages serves all scripts, so that the stamp of one is not stale for another.
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { echo "Another set-up is running; waiting for it." >&2; flock 9; }
        fi
        [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted_stamp "$extra")" ] && [ -x "$PYTHON" ] || install_into_venv "$extra"
    ) 9>"$PROJECT/.setup.lock" || exit 1
}
