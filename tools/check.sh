#!/usr/bin/env bash
# The one gate, the same here and in CI: format, lint, types, tests. Runs in the environment whose python is on PATH.
# Arguments are pytest's; later ones win: `tools/check.sh -n 0` runs the tests one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
python -m pytest -q -n logical --maxprocesses 4 "$@"
