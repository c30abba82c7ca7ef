#!/usr/bin/env bash
# The gate, the same here and in CI: format, lint, types, documentation, tests. It uses the environment whose python is
# first on PATH. Arguments go to pytest, and later ones win: `tools/check.sh -n 0` runs the tests in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
NO_MKDOCS_2_WARNING=1 mkdocs build --strict  # --quiet would hide warnings from --strict
python -m pytest -q -n logical --maxprocesses 4 "$@"
