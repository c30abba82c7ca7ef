"""fingerprint.py and gemm.kernel_hash: every part that can change a result counts; names, text and layout do not."""

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from int8kit.fingerprint import fingerprint
from int8kit.kernels import gemm
from int8kit.spec import Kernel

PACKAGE = Path(gemm.__file__).parent.parent

HELPERS = '''
"""What the launcher reaches."""
import enum
import warnings
from dataclasses import dataclass

LIMIT = 5
TABLE = {1: 2, 3: 4}
DERIVED = max(TABLE)
CACHE: dict = {}

class Kind(enum.Enum):
    LOW = 1
    HIGH = 2

@dataclass
class Operands:
    """Checked once."""
    x: int
    y: int = 3

    def __post_init__(self):
        if self.x < 0:
            raise ValueError("x must not be negative")

    @property
    def used(self):
        return self.x + 1

    def unused(self):
        return 9

    def __str__(self):
        return "operands"

def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)

if LIMIT > 3:
    MODE = "wide"
else:
    MODE = "narrow"

def times(factor):
    def inner(x):
        return x * factor
    return inner

double = times(2)

def logged(f):
    def wrapper(*a):
        return f(*a)
    return wrapper

@logged
def halved(x):
    return x // 7

def told(text):
    warnings.warn(f"slow: {text}")
    return 0
'''

KERNEL = """
import math
from functools import cache

from {name} import helpers
from {name}.helpers import LIMIT, Operands, cdiv

@cache
def constants(block, *, even=False):
    return (("BLOCK", block), ("EVEN", even))

def grid(rows, block):
    tiles = cdiv(rows, block) * LIMIT
    return [tiles + i for i in range(3) if i < math.floor(2.5)]

def launch(o, block, options):
    from {name}.helpers import told

    made = Operands(1)
    helpers.CACHE[block] = made
    size: int = grid(o.m, block)
    found = helpers.TABLE, helpers.DERIVED, helpers.Kind.HIGH, told(1)
    more = helpers.MODE, helpers.double(2), helpers.halved(4)
    return size, constants(block, even=True), made.used, found, more, {{"a": 1}}

def why_not(o):
    # the copy is 16 bytes wide
    if o.k % 16:
        return f"K = {{o.k}} is not a multiple of 16"
    return None
"""

COUNTS = [
    ("helpers", "LIMIT = 5", "LIMIT = 6"),
    ("helpers", "3: 4}", "3: 5}"),
    ("helpers", "max(TABLE)", "min(TABLE)"),
    ("helpers", "HIGH = 2", "HIGH = 3"),
    ("helpers", "y: int = 3", "y: int = 4"),
    ("helpers", "self.x < 0", "self.x < 1"),
    ("helpers", "self.x + 1", "self.x + 2"),
    ("helpers", "-(-a // b)", "a // b"),
    ("helpers", "return 0", "return 1"),
    ("helpers", "LIMIT > 3", "LIMIT > 9"),
    ("helpers", '"narrow"', '"thin"'),
    ("helpers", "times(2)", "times(3)"),
    ("helpers", "x * factor", "x + factor"),
    ("helpers", "x // 7", "x // 8"),
    ("helpers", "return f(*a)", "return f(*a) + 1"),
    ("helpers", "@logged\n", ""),
    ("kernel", '("BLOCK", block)', '("BLOCK_M", block)'),
    ("kernel", '("BLOCK", block), ("EVEN", even)', '("EVEN", even), ("BLOCK", block)'),
    ("kernel", "even=True", "even=False"),
    ("kernel", "even=False)", "even=True)"),
    ("kernel", "cdiv(rows, block)", "cdiv(block, rows)"),
    ("kernel", "range(3)", "range(2)"),
    ("kernel", "i < math.floor", "i <= math.floor"),
    ("kernel", "math.floor", "math.ceil"),
    ("kernel", 'constants(block, even=True), made.used', 'made.used, constants(block, even=True)'),
    ("kernel", '{"a": 1}', '{"a": 2}'),
    ("kernel", "o.k % 16", "o.k % 8"),
    ("kernel", "    return None\n", "    return None if o.m else 'empty'\n"),
    ("kernel", "@cache\n", ""),
]  # fmt: skip
KEEPS = [
    ("helpers", "Checked once.", "Checked at the start."),
    ("helpers", "x must not be negative", "x < 0"),
    ("helpers", "slow: ", "slower: "),
    ("helpers", "return 9", "return 10"),
    ("helpers", 'return "operands"', 'return "o"'),
    ("helpers", "LOW = 1", "LOW = 7"),
    ("helpers", '"""a / b, rounded up."""\n    ', ""),
    ("helpers", "inner", "scaled"),
    ("helpers", "factor", "by"),
    ("kernel", "tiles", "count"),
    ("kernel", "rows", "extent"),
    ("kernel", "made", "checked"),
    ("kernel", "tiles + i for i in range(3) if i <", "tiles + step for step in range(3) if step <"),
    ("kernel", "size: int", "size: list"),
    ("kernel", "grid(", "programs("),
    ("kernel", "# the copy is 16 bytes wide", ""),
    ("kernel", "is not a multiple of 16", "must be a multiple of 16"),
    ("kernel", "    made = Operands(1)\n", "\n    made = Operands(\n        1\n    )\n"),
    ("kernel", "import math\n", "import math  # floor\n\n"),
]


NUMBERS = itertools.count()  # a new name for each package: Python caches imported modules


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """A function that gives the fingerprint of the package above after one edit of one file."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(file=None, old="", new=""):
        name = f"walked_{next(NUMBERS)}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for stem, text in (("helpers", HELPERS), ("kernel", KERNEL.format(name=name))):
            if stem == file:
                assert old in text
                text = text.replace(old, new)
            (folder / f"{stem}.py").write_text(text)
        kernel = importlib.import_module(f"{name}.kernel")
        return fingerprint(kernel.launch, kernel.why_not)

    return made


@pytest.mark.parametrize(("file", "old", "new"), COUNTS)
def test_edit_that_can_change_a_result_counts(hash_of, file, old, new):
    assert hash_of(file, old, new) != hash_of()


@pytest.mark.parametrize(("file", "old", "new"), KEEPS)
def test_names_text_and_layout_do_not_count(hash_of, file, old, new):
    assert hash_of(file, old, new) == hash_of()


def test_names_of_keyword_parameters_count(hash_of):
    """If a caller passes arguments by name, two exchanged names give another result."""
    exchanged = 'def constants(even, *, block=False):\n    return (("BLOCK", even), ("EVEN", block))'
    before = 'def constants(block, *, even=False):\n    return (("BLOCK", block), ("EVEN", even))'
    assert hash_of("kernel", before, exchanged) != hash_of()


REAL = {  # one edit of each part of each kernel: file, old text, new text, part
    "triton": [
        ("kernels/gemm_triton.py", "ks < K - k)[None", "ks <= K - k)[None", "device code"),
        ("kernels/gemm_triton.py", "cdiv(o.m, config.block_m) * cdiv", "o.m // config.block_m * cdiv", "grid"),
        ("kernels/gemm_triton.py", "o.xq.stride(0), o.wq.stride(0)", "o.wq.stride(0), o.xq.stride(0)", "launcher"),
        ("kernels/gemm_triton.py", '("EVEN_K", even_k)', '("EVEN_K", True)', "constants"),
        ("kernels/gemm_triton.py", '"num_stages": config.num_stages}', '"num_stages": 2}', "options"),
        ("kernels/gemm_triton.py", "    return None\n", "    return '' if operands.m == 1 else None\n", "why_not"),
        ("kernels/epilogue.py", "* sx * sw", "* sw * sx", "epilogue"),
        ("kernels/l2_swizzle.py", "tl.minimum(tiles_m - first, group_m)", "group_m", "swizzle"),
        ("kernels/activations.py", "constexpr(86.0)", "constexpr(87.0)", "constant of a helper"),
        ("kernels/launch.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True', "compile options"),
        ("kernels/launch.py", "loose % 16", "loose % 8", "specialization"),
        ("kernels/gemm.py", "if operands.m == 0:", "if operands.m <= 1:", "entry"),
    ],
    "mma_sync": [
        ("kernels/gemm_mma_sync.py", "return min(4, config", "return min(2, config", "layout"),
        ("kernels/gemm_mma_sync.py", "tiles - leftover + workers", "tiles - leftover", "grid"),
        ("kernels/gemm_mma_sync.py", "FRAGMENT_K = 32", "FRAGMENT_K = 64", "module constant"),
        ("kernels/gemm_mma_sync.py", "128: 768}", "128: 384}", "table"),
        ("kernels/gemm_mma_sync.py", "[16, 8])),", "[16, 16])),", "constants"),
        ("kernels/gemm_mma_sync.py", "operands.k % 16", "operands.k % 8", "why_not"),
        ("kernels/stream_k.py", "total * worker // workers", "total // workers * worker", "scheduler"),
        ("kernels/stream_k.py", "max(leftover, 1) * pieces", "max(leftover, 1)", "workspace"),
        ("spec.py", "m <= config.num_warps]", "m < config.num_warps]", "warp grid"),
    ],
    "wgmma": [
        ("kernels/gemm_wgmma.py", "BOX_ROWS = 16", "BOX_ROWS = 32", "box"),
        ("kernels/gemm_wgmma.py", '"launch_pdl": True', '"launch_pdl": False', "options"),
        ("kernels/gemm_wgmma.py", "constexpr(3)", "constexpr(4)", "lag"),
        ("kernels/gemm_wgmma.py", "    gdc_wait()", "    pass", "wait"),
        ("kernels/gemm_wgmma.py", "pieces = 2 if", "pieces = 1 if", "launcher"),
        ("kernels/gemm_wgmma.py", "== (9, 0)", ">= (9, 0)", "device"),
    ],
}
SAME = [
    ("kernels/l2_swizzle.py", "height", "rows_of_group"),
    ("kernels/gemm_triton.py", "    # int64: M * K and M * N may pass 2**31\n", ""),
    ("kernels/gemm_triton.py", "_gemm", "_product"),
    ("kernels/gemm_wgmma.py", "is not a multiple of 16", "has to be a multiple of 16"),
    ("kernels/gemm_mma_sync.py", "tiles", "count"),
    ("kernels/operands.py", "move them to it", "use one device"),
    ("kernels/stream_k.py", '"""Number of multiprocessors of a CUDA device."""', '"""Multiprocessors."""'),
]

CHILD = """
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
for file, old, new in json.load(sys.stdin):
    path = root / "int8kit" / file
    text = path.read_text()
    assert text.count(old), (file, old)
    path.write_text(text.replace(old, new))
    for name in [name for name in sys.modules if name.startswith("int8kit")]:
        del sys.modules[name]
    from int8kit.kernels import gemm
    from int8kit.spec import Kernel
    assert gemm.__file__.startswith(str(root))
    print(json.dumps([gemm.kernel_hash(kernel) for kernel in Kernel]), flush=True)
    path.write_text(text)
"""


@pytest.mark.slow
@pytest.mark.process
def test_each_part_of_each_kernel_counts(tmp_path, monkeypatch):
    """All edits in one child process, on a copy of the package: imports cost more than the hashes."""
    shutil.copytree(PACKAGE, tmp_path / "int8kit", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    edits = [edit[:3] for edits in REAL.values() for edit in edits]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], input=json.dumps([*edits, *SAME]), cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hashes = [json.loads(line) for line in done.stdout.splitlines()]
    present = [gemm.kernel_hash(kernel) for kernel in Kernel]
    found = iter(hashes)
    for place, edits in enumerate(REAL.values()):
        for file, old, _, part in edits:
            assert next(found)[place] != present[place], f"{part}: {file}, {old}"
    assert [next(found) for _ in SAME] == [present] * len(SAME)


def test_kernels_have_different_hashes():
    assert len({gemm.kernel_hash(kernel) for kernel in Kernel}) == len(Kernel)
