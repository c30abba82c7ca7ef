"""Promises outside the code: imports, exported names, shipped files, the documents, and tests that can fail."""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import int8kit
from int8kit import files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "int8kit"
MODULES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = sorted(ROOT.glob("*.md"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
# A module may import those of the layers before its own, and of its own.
LAYERS = [
    {"errors"}, {"spec"}, {"canonical", "files", "fingerprint", "gpus", "lookup", "reference", "models", "toolchain"},
    {"shapes_schema"}, {"shapes_file"}, {"kernels", "database"}, {"cost_model", "ops"},
    {"layers", "timing"},
    {"trace", "tune", "verify", "runtime"}, {"bench"}, {"doctor"}, {"cli"}, {"__main__"},
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


def test_what_the_tests_here_go_through_is_there():
    assert len(MODULES) > 50
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in DOCUMENTS}
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
            assert rank[name] <= rank[stem(path)], f"{path} imports {name}"


def test_stages_do_not_import_each_other():
    stages = {"trace", "tune", "verify", "runtime"}
    assert stages <= {stem(path) for path in MODULES}
    for path in MODULES:
        if stem(path) in stages:
            assert not (set(imported(path)) & stages) - {stem(path)}, path


def test_reference_imports_nothing_that_it_judges():
    assert set(imported(PACKAGE / "reference.py")) == {"errors", "spec"}
    assert set(imported(PACKAGE / "spec.py")) == {"errors"}


def test_exported_names_are_pinned():
    assert int8kit.__all__ == [
        "__version__", "ConfigError", "FileError", "GemmShape", "InputError", "Int8Linear", "Int8kitError",
        "Plan", "ShapeError", "TileConfig", "UnknownName", "Int8SwiGLU", "int8_linear", "int8_linear_swiglu",
        "qk_norm_rope", "quantize", "residual_norm_quantize", "rms_norm_quantize", "scaled_mm",
        "scaled_mm_swiglu", "swiglu_quantize",
    ]  # fmt: skip
    for name in int8kit.__all__:
        assert getattr(int8kit, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = int8kit.nothing


@pytest.mark.process
def test_import_touches_nothing_heavy():
    code = "import sys, int8kit; print(sorted(m for m in ('torch', 'triton', 'diffusers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_module_opens_with_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_documents_name_files_that_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} -> {target}"
        for path in re.findall(r"`((?:int8kit|tests|tools|docs|shapes|tuning_db)/[\w./*-]+)`", document.read_text()):
            assert list(ROOT.glob(path)), f"{document.name} names {path}"


def console(document):
    """The int8kit commands in a document's console blocks, with their continuation lines joined."""
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.removeprefix("$ ").split("  #")[0].strip() for line in lines if "int8kit " in line and "pip" not in line
    ]


def examples():
    yield from ((doc.name, command) for doc in DOCUMENTS for command in console(doc))
    for module in (PACKAGE / "cli").glob("*.py"):
        for command in re.findall(r"^ +Example: (.+)$", module.read_text(), re.MULTILINE):
            yield module.name, command.strip()


MARKS = {"run": ["slow"], "trace-shapes": ["slow"], "tune": ["slow", "process"]}
"""By verb. In test_cli.py's group a second tuner finds kernels of the first."""
ELSEWHERE = {"int8kit verify --gpu rtx3090": "test_cli.py", "int8kit doctor": "test_doctor.py"}
"""Run as they stand by tests that look at more than the exit status."""


def documented():
    for command, where in {command: where for where, command in examples() if command not in ELSEWHERE}.items():
        marks = [getattr(pytest.mark, name) for name in MARKS.get(command.split()[1], ())]
        yield pytest.param(command, where, marks=[*marks, pytest.mark.xdist_group("workshop")] if marks else [])


def test_commands_that_other_tests_run_are_there():
    assert set(ELSEWHERE) <= {command for _, command in examples()}
    for command, name in ELSEWHERE.items():
        assert f'"{command}"' in (Path(__file__).parent / name).read_text()


@pytest.mark.parametrize(("command", "where"), list(documented()))
def test_commands_of_the_documents_run(command, where, tmp_path, monkeypatch, verb):
    """Each printed command as it stands, in an empty folder; those that need a real card or real weights parse only."""
    program, *args = shlex.split(command)
    assert program == "int8kit", f"{where}: {command}"
    card = "bench" in args or ("tune" in args and "--gpu" not in args)
    needs = card or "ideogram-ai/" in command
    if "tuning_db/" in command:
        shutil.copytree(files.shipped("tuning_db"), tmp_path / "tuning_db")
    if needs:
        args = [*itertools.takewhile(lambda word: word[0].isalpha(), args), "--help"]
    monkeypatch.chdir(tmp_path)
    out, _ = verb(*args)
    if args[0] in ("tune", "trace-shapes", "run") and not needs:
        assert "wrote" in out


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


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
    code = "from int8kit import files, trace; from int8kit.database import store; print(files.shipped('shapes')); "
    code += "store.load(store.find('rtx3090')); "
    code += "print(len(trace.read(files.shipped('shapes') / 'ideogram4.json')['cases']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "int8kit" / "shapes"), "12"], done.stderr


def test_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert files.shipped("tuning_db").is_dir()


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["y"].shape == (2, 12288)


CHECKERS = {"raises", "warns", "fail", "opcheck", "benchmark"}


def collected(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]


def name_of(call):
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def can_be_false(test):
    """False for what an assertion takes for true whatever it means: a text, a tuple, a generator, x == x."""
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
    """Whether an operand of `or` is answered by yes or no: anything else may be a text that is always there."""
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
    """What in a test module would pass whatever the program does, where that can be seen: [(line, why)]."""
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
def test_what_cannot_fail_is_seen(statement, why):
    helpers = "def helper():\n    pass\ndef checker():\n    assert x > 0\n"
    found = cannot_fail(f"{helpers}def test_it():\n    {statement}\n")
    assert [one for _, one in found] == ([why] if why else [])
