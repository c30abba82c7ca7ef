#!/usr/bin/env bash
# Trace, tune for an RTX 3090, verify and run, also on a machine without a GPU. Every file goes into one folder.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out}
say() { printf '\n== %s\n' "$*" && "$@"; }
say int8kit trace-shapes ideogram4 --size 1024x1024 --output "$out/shapes.json"
say int8kit tune --gpu rtx3090 --shapes "$out/shapes.json" --output "$out/rtx3090.json"
say int8kit verify --gpu rtx3090 --db "$out/rtx3090.json"
say int8kit run --gpu rtx3090 --db "$out/rtx3090.json" --output "$out/demo.png"
printf '\nThe model of this demo has random weights: %s shows noise.\n' "$out/demo.png"
