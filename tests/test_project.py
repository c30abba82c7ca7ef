"""Promises outside the code: imports, exported names, types, shipped files, tools, and tests that can fail."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import int8kit
from int8kit import files
from int8kit.toolchain import unsupported

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "int8kit"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
# A module imports modules of earlier layers, and of its own package.
LAYERS = [
    {"errors"}, {"files", "gpu_records", "locks", "spec", "tiny_model"},
    {
        "canonical", "damage", "gradient", "image_errors", "interrupt", "layer_state", "models",
        "operand_checks", "peers", "progress", "reference", "saved_models", "toolchain",
    },
    {"fingerprint", "gpus", "shapes_schema"}, {"cost_model", "kernels", "shapes_file"},
    {"ranking"}, {"lookup"}, {"database"}, {"ops"},
    {"adapters", "foreign_weights"}, {"layers", "timing"}, {"quantization"},
    {"trace", "tune", "verify", "runtime"}, {"bench"}, {"doctor"}, {"integrations"}, {"pipelines"},
    {"cli"}, {"__main__"},
]  # fmt: skip


def stem(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Our modules that a file imports anywhere, by their first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "int8kit":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("int8kit."))


def test_modules_tests_and_databases_are_found():
    assert len(MODULES) > 50
    assert len(TESTS) > 40
    assert len(list(files.shipped("tuning_db").glob("*.json"))) >= 8  # by which other modules parametrize tests


def test_imports_go_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in MODULES:
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        for name in imported(path):
            if name == "__version__":
                continue
            assert name == stem(path) or rank[name] < rank[stem(path)], f"{path} imports {name}"


def test_stages_do_not_import_each_other():
    stages = {"trace", "tune", "verify", "runtime"}
    assert stages <= {stem(path) for path in MODULES}
    for path in MODULES:
        if stem(path) in stages:
            assert not (set(imported(path)) & stages) - {stem(path)}, path


def test_nothing_imports_the_integrations():
    """They are doors for other libraries. `int8kit/__init__.py` names one function of theirs, lazily.

    `pipelines` imports the module of LoRA files, which registers nothing.
    """
    outside = [path for path in MODULES if stem(path) not in ("integrations", "__init__", "pipelines")]
    assert "integrations.diffusers" not in (PACKAGE / "pipelines.py").read_text()
    assert "integrations" in map(stem, MODULES)
    assert not [path for path in outside if "integrations" in imported(path)]


def test_reference_imports_no_kernel():
    assert set(imported(PACKAGE / "reference.py")) == {"errors", "spec"}
    assert set(imported(PACKAGE / "spec.py")) == {"errors"}


def reached(first):
    """Our modules that are loaded with those of `first`, by their first name: the closure of `imported`."""
    found, todo = set(), [first]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [below for path in MODULES if stem(path) == name for below in imported(path)]
    return found - {"__version__"}


def test_kernels_need_neither_the_database_nor_pydantic():
    below = reached("kernels")
    assert "database" not in below
    allowed = {"kernels", "errors", "spec", "canonical", "fingerprint", "gpu_records", "gpus", "files", "reference"}
    assert below <= {*allowed, "toolchain"}
    modules = [path for path in MODULES if stem(path) in below]
    assert len(modules) > 10
    assert not [path for path in modules if re.search(r"^\s*(from|import) pydantic", path.read_text(), re.MULTILINE)]


EXPORTED = [
    "CheckFailed", "ConfigError", "Database", "FileError", "GemmShape", "InputError", "Int8Linear", "Int8SwiGLU",
    "Int8kitError", "Kernel", "NotTuned", "Operation", "Plan", "Policy", "QuantizationReport", "ShapeError", "Source",
    "TileConfig", "UnknownName", "__version__", "int8_linear", "int8_linear_swiglu",
    "load_database", "load_plans", "optimize", "pipeline_config", "qk_norm_rope", "quantize", "quantize_",
    "replace_linears", "residual_norm_quantize", "restore", "rms_norm_quantize", "scaled_mm", "scaled_mm_swiglu",
    "swiglu_quantize",
]  # fmt: skip


def test_exported_names_are_pinned():
    assert int8kit.__all__ == EXPORTED == sorted(EXPORTED)
    assert dir(int8kit) == EXPORTED
    for name in EXPORTED:
        assert getattr(int8kit, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = int8kit.nothing


def test_names_for_type_checkers_are_those_at_run_time():
    """The imports under TYPE_CHECKING name the module that the lazy import loads."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"int8kit.{module}" for name, module in int8kit._MODULE_OF.items()}
    assert {*typed, "__version__"} == set(int8kit.__all__)


@pytest.mark.process
def test_types_reach_a_user(tmp_path):
    """mypy --strict sees the classes behind the lazy names in a file of somebody else's."""
    (tmp_path / "mine.py").write_text(
        "import int8kit\nreveal_type(int8kit.Int8Linear)\nint8kit.Int8Linear.no_such_method()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", tmp_path / "cache", "mine.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    revealed, wrong = [line for line in done.stdout.splitlines() if line.startswith("mine.py")]
    assert 'Revealed type is "def (' in revealed, done.stdout
    assert revealed.endswith('-> int8kit.layers.Int8Linear"')
    assert '"type[Int8Linear]" has no attribute "no_such_method"' in wrong


@pytest.mark.process
def test_import_touches_nothing_heavy():
    """`import int8kit` loads no large package and takes a few milliseconds, of which a busy machine makes many."""
    code = "import sys, time; t = time.perf_counter(); import int8kit; t = time.perf_counter() - t; "
    code += "print(t, [m for m in ('torch', 'triton', 'diffusers', 'pydantic', 'numpy') if m in sys.modules])"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, heavy = zip(*(run.stdout.split(maxsplit=1) for run in runs), strict=True)
    assert set(heavy) == {"[]\n"}
    assert min(map(float, seconds)) < 0.1


def test_every_module_has_a_docstring():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.process
def test_wheel_holds_the_shipped_files(tmp_path):
    """A wheel built from this tree finds its shapes and databases outside the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]  # by the environment's hatchling
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "from int8kit import files, shapes_file; from int8kit.database import store; print(files.shipped('shapes')); "
    )
    code += "store.load(store.find('rtx3090')); "
    code += "print(len(shapes_file.read(files.shipped('shapes') / 'ideogram4.json')['cases']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "int8kit" / "shapes"), "12"], done.stderr
    assert (site / "int8kit" / "py.typed").is_file()


def test_version_is_written_once():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert f"## {int8kit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert files.shipped("tuning_db").is_dir()


def test_both_bounds_of_triton_agree():
    """The dependency and the check at run time."""
    [bound] = [d for d in PYPROJECT["project"]["dependencies"] if d.startswith("triton")]
    supported = SpecifierSet(bound.removeprefix("triton").partition(";")[0])
    for version in ("3.5.1", "3.6.0", "3.7.1", "3.9.9", "3.10.0", "4.0.0"):
        assert (version in supported) is (unsupported(version) is None), version


def test_tools_agree_on_the_gate():
    """The workflow and .ci/run call the same target; hooks run the same tools."""
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "- run: make test" in (ROOT / ".github" / "workflows" / "gate.yml").read_text()
    check = (ROOT / "tools" / "check.sh").read_text()
    for tool in ("ruff format", "ruff check", "mypy"):
        assert f"\n{tool}" in check
        assert f"entry: {tool}" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert "mkdocs build --strict" in check
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "triton", "ruff", "mypy", "mkdocs-material", "mkdocstrings-python", "pip"} <= set(pinned)


CHECKERS = {"raises", "warns", "fail", "opcheck", "benchmark"}


def collected(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]


def name_of(call):
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def can_be_false(test):
    """False for an expression that is always true: a text, a tuple, a generator, x == x."""
    if isinstance(test, ast.Compare):
        return all(ast.dump(other) != ast.dump(test.left) for other in test.comparators)
    if isinstance(test, ast.BoolOp):
        return all(map(can_be_false, test.values)) and (
            isinstance(test.op, ast.And) or all(map(is_question, test.values))
        )
    return not isinstance(
        test, ast.Constant | ast.JoinedStr | ast.Tuple | ast.List | ast.Set | ast.Dict | ast.GeneratorExp | ast.Lambda
    )


def is_question(test):
    """Whether an operand of `or` is a yes-or-no question. Anything else may be a text, which is always true."""
    if isinstance(test, ast.BoolOp):
        return all(map(is_question, test.values))
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    if isinstance(test, ast.Call):
        return name_of(test) in {"all", "any", "isinstance"}
    return isinstance(test, ast.Compare)


def checks_something(function, functions, seen=()):
    """Whether a function asserts or expects an error, itself or by another of its module."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = name_of(node)
            if name in CHECKERS or name.startswith("assert"):
                return True
            if name in functions and name not in seen and checks_something(functions[name], functions, (*seen, name)):
                return True
    return False


def cannot_fail(source):
    """Statements of a test module that pass for every program: [(line, why)]. Finds the obvious ones only."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = [(test.lineno, "no assertion") for test in collected(tree) if not checks_something(test, functions)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and not can_be_false(node.test):
            found.append((node.lineno, "always true"))
        if isinstance(node, ast.Call) and name_of(node) == "raises" and ast.unparse(node.args[0]).endswith("Exception"):
            found.append((node.lineno, "any exception"))
    return found


def test_every_test_can_fail():
    assert {str(path): found for path in TESTS if (found := cannot_fail(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ('assert "1 of 3 differ" in text or difference(a, b)', "always true"),
        ('assert text == "a" or "b"', "always true"),
        ('assert (text == "a", "why")', "always true"),
        ("assert (x > 0 for x in found)", "always true"),
        ("assert text == text", "always true"),
        ("assert text and 1", "always true"),
        ("difference(a, b)", "no assertion"),
        ("helper()", "no assertion"),
        ("with pytest.raises(Exception, match='x'):\n        pass", "any exception"),
        ("assert x in text or not y or any(found)", None),
        ("assert difference(a, b)", None),
        ("checker()", None),
    ],
)
def test_statements_that_cannot_fail_are_found(statement, why):
    helpers = "def helper():\n    pass\ndef checker():\n    assert x > 0\n"
    found = cannot_fail(f"{helpers}def test_it():\n    {statement}\n")
    assert [one for _, one in found] == ([why] if why else [])
