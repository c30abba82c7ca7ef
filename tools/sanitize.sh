#!/bin/sh
# Run compute-sanitizer's memcheck, racecheck and initcheck over a launch of every kernel.
# Needs a GPU and the CUDA toolkit.
#   tools/sanitize.sh [OUTPUT]      one line per tool, also in OUTPUT; exit status 1 if a tool found a fault of int8kit
set -eu
output=${1:-out/sanitize.txt}
python=${PYTHON:-python}
command -v compute-sanitizer >/dev/null || { echo "sanitize: no compute-sanitizer; it is part of the CUDA toolkit" >&2; exit 2; }
mkdir -p "$(dirname "$output")"
: >"$output"
"$python" tools/launches.py >/dev/null  # compiles the kernels, so that the tools do not check the compiler's processes
status=0
for tool in memcheck racecheck initcheck; do
    if compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tools/launches.py >"$output.$tool" 2>&1; then
        found="nothing found"
    else
        found="FOUND, see $output.$tool"
        [ "$tool" = racecheck ] || status=1 # hazards.py decides below whose they are
    fi
    summary=$(grep -E "(ERROR|RACECHECK) SUMMARY" "$output.$tool" | tail -n 1 | sed 's/=*//')
    echo "$tool: $found;$summary" | tee -a "$output"
    if [ "$tool" = racecheck ]; then
        "$python" tools/hazards.py "$output.$tool" >"$output.hazards" || status=1
        tee -a "$output" <"$output.hazards"
        rm "$output.hazards"
        continue
    fi
    # each error and its kernel once, without addresses and threads
    grep -E "Error: |Invalid|Uninitialized" "$output.$tool" | sed -E 's/=+ +//; s/\+0x[0-9a-f]+//g; s/0x[0-9a-f]+//g' |
        sort | uniq -c | sort -rn | head -n 30 | tee -a "$output"
done
exit $status
