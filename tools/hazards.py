"""Sort the findings of racecheck: those in an int8kit kernel, and those in Triton's start of warp groups.

    python tools/hazards.py out/sanitize.txt.racecheck      one line per finding; exit status 1 if any is ours

The code that Triton compiles for `gl.warp_specialize` makes the other warps wait. Each of them reads its group from
shared memory. The first warps write it there, between barriers of the whole block. racecheck reports this read and
these writes once for every launch, although no line of int8kit makes them. Their source lines are the kernel's `def`
and its `gl.warp_specialize`. A finding with an access on any other line is ours: the kernel accesses its own shared
memory on other lines.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "int8kit" / "kernels"
_END = re.compile(r"(Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+?):(\d+)")
_SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed")

End = tuple[str, str, str, int]  # Read or Write, kernel, file, line
UNREAD: End = ("An", "a kernel", "of no known line", 0)


def hazards(report: str) -> list[frozenset[End]]:
    """The accesses of each hazard in racecheck's report."""
    found = []
    for block in report.split("Race reported between ")[1:]:
        ends = (_END.search(line) for line in block.splitlines() if " access at " in line)
        found.append(frozenset((e[1], e[2], Path(e[3]).name, int(e[4])) if e else UNREAD for e in ends))
    return found


def dispatch_lines(kernel: str, file: str) -> set[int]:
    """Lines of `file` to which racecheck attributes Triton's dispatch: `def kernel(` and `gl.warp_specialize(`."""
    path = KERNELS / file
    lines = path.read_text().splitlines() if path.is_file() else []
    return {i for i, line in enumerate(lines, 1) if f"def {kernel}(" in line or line.strip() == "gl.warp_specialize("}


def is_dispatch(ends: frozenset[End]) -> bool:
    """Whether every access of a hazard belongs to Triton's dispatch of warps."""
    return bool(ends) and all(line in dispatch_lines(kernel, file) for _, kernel, file, line in ends)


def main(path: Path) -> int:
    report = path.read_text()
    summary = _SUMMARY.search(report)
    found = hazards(report)
    if summary is None or int(summary[1]) != len(found) or ": launched" not in report:
        listed = "no summary" if summary is None else f"{summary[1]} hazards"
        print(f"not every kernel was launched, or the report cannot be read: {listed}, {len(found)} read")
        return 1
    ours = 0
    for ends, count in Counter(found).most_common():
        whose = "Triton's start of warp groups" if is_dispatch(ends) else "OURS"
        ours += count * (not is_dispatch(ends))
        where = ", ".join(f"{kind.lower()} {file}:{line}" for kind, _, file, line in sorted(ends, key=lambda e: e[3]))
        print(f"{count:6d} in {' and '.join(sorted({kernel for _, kernel, _, _ in ends}))}: {where}: {whose}")
    print(f"{len(found)} hazards, {ours} of them ours")
    return min(ours, 1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: hazards.py REPORT")
    sys.exit(main(Path(sys.argv[1])))
