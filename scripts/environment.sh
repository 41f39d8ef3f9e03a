# Sourced by demo.sh and test.sh. `environment EXTRA` makes .venv, installs this checkout into it with that extra
# under the pins of constraints.txt, and puts it first on the PATH. What is already there is not installed again;
# the extra test has all others that are asked for here.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if recent_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer was not found on the PATH." >&2
    return 1
}

installed() { [[ "$(cat "$venv/.installed-$1" 2>/dev/null)" == "$wanted" ]]; }

install() {
    "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$@"
}

environment() {
    local extra="$1" wanted python
    if ! recent_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "== creating $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    # The path is part of it: an editable install points to the checkout.
    wanted="$root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if ! installed "$extra" && ! installed test; then
        echo "== installing vitrt[$extra] (the first time takes a few minutes)"
        # Python's own pip may be years old, and slow: for each file of a package it goes over all tags.
        install --upgrade pip
        # Python compiles what is imported, a third of it.
        install --no-compile --editable "$root[$extra]"
        echo "$wanted" >"$venv/.installed-$extra"
    fi
    unset PYTHONDONTWRITEBYTECODE  # for it keeps what it compiled
    export PATH="$venv/bin:$PATH"
}
