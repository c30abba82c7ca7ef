#!/usr/bin/env bash
# The whole pipeline in four verbs, on a machine with or without a GPU: trace, tune for an RTX 3090, verify, run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out}
say() { printf '\n== %s\n' "$*" && "$@"; }
say int8kit trace-shapes ideogram4 --size 1024x1024 --output "$out/shapes.json"
say int8kit tune --gpu rtx3090 --shapes "$out/shapes.json" --output "$out/rtx3090.json"
say int8kit verify --gpu rtx3090 --db "$out/rtx3090.json"
say int8kit run --gpu rtx3090 --db "$out/rtx3090.json" --output "$out/demo.png"
