#!/usr/bin/env bash
# Installs everything the tests need into .venv, then lints, type-checks and runs the whole test suite.
# Arguments go to pytest: ./scripts/test.sh tests/test_config.py -m "not slow"
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
environment test

echo "== ruff"
ruff check .
ruff format --check .

echo "== mypy"
mypy

echo "== pytest"
# One worker a core, one thread each: the tests are many and small, and threads of several workers
# only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest --numprocesses auto --dist worksteal "$@"
