# Sourced by demo.sh and test.sh. `environment EXTRA` makes .venv, installs this checkout into it with that extra
# under the pins of constraints.txt, and puts it first on the PATH. What is already there is not installed again.

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

environment() {
    local extra="$1" stamp wanted python
    if ! recent_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "== creating $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    stamp="$venv/.installed-$extra"
    # The path is part of it: an editable install points to the checkout.
    wanted="$root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        echo "== installing vitrt[$extra] (the first time takes a few minutes)"
        "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" --editable "$root[$extra]"
        echo "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH"
}
