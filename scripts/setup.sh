# Sourced by the other scripts: finds or makes a Python that has everything, and puts its path into PYTHON.
#
#   setup_environment EXTRAS MODULE...    EXTRAS: extras of setup.cfg to install; MODULE: what must be importable then
#
# An active environment that has all modules is used as it is. Otherwise the project's own .venv is used, and made or
# brought up to date first if need be. A stamp in .venv, written last, says what was installed from which setup.cfg: a
# .venv without any stamp comes from an interrupted set-up and is made again. Set-ups that run at once wait for each other.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The code is this checkout's, whatever the environment may have installed, and wherever the script is called from.
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "error: $*" >&2
    exit 1
}

# Modules are looked up, not imported: importing torch and timm takes seconds.
has_modules() {
    "$1" -c 'import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 11) or any(find_spec(name) is None for name in sys.argv[1:]))' "${@:2}" 2>/dev/null
}

current_stamp() { { echo "$PROJECT" "$1"; cat "$PROJECT/setup.cfg" "$PROJECT/pyproject.toml"; } | cksum; }

# Whether .venv was made from the present setup.cfg with the extras asked for, and perhaps more.
is_ready() {
    local stamp extras
    [ -x "$PROJECT/.venv/bin/python" ] || return
    for stamp in "$PROJECT"/.venv/.stamp-*; do
        extras=${stamp##*/.stamp-}
        case ",$extras," in
            *",$1,"*) [ "$(cat "$stamp")" = "$(current_stamp "$extras")" ] && return ;;
        esac
    done
    return 1
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on the PATH"
}

install_into_venv() {
    local base venv="$PROJECT/.venv"
    if ! compgen -G "$venv/.stamp-*" >/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python) || exit 1
        "$base" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$base cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
        echo "Setting up $venv; the first time this downloads PyTorch and takes a few minutes." >&2
        "$base" -m venv --clear "$venv" || fail "$base could not make $venv"
    else
        echo "Bringing $venv up to date." >&2
        rm -f "$venv"/.stamp-*
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$PROJECT[$1]" >&2 ||
        fail "pip could not install the project; its lines above say why"
    current_stamp "$1" >"$venv/.stamp-$1"
}

setup_environment() {
    local extras=$1
    shift
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_modules python "$@"; then
        PYTHON=$(command -v python)
        return
    fi
    PYTHON="$PROJECT/.venv/bin/python"
    is_ready "$extras" && return
    (
        if command -v flock >/dev/null; then
            flock --nonblock 9 || { echo "Another set-up is running; waiting for it." >&2 && flock 9; }
        fi
        is_ready "$extras" || install_into_venv "$extras"
    ) 9>"$PROJECT/.setup.lock" || exit 1
}
