#!/usr/bin/env bash
# The gate, the same for developers and CI: format, lint, types, tests. Uses the environment whose python is on PATH.
# Arguments go to pytest, and later ones override: `tools/check.sh -n 0` runs the tests one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
python -m pytest -q -n logical --maxprocesses 4 "$@"
