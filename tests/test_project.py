"""Promises outside the code: import direction, exported names, what an import touches, shipped files, the documents."""

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
# A module may import those of the layers before its own, and of its own.
LAYERS = [
    {"spec"}, {"files", "fingerprint", "gpus", "lookup", "reference", "models", "sensors", "toolchain"},
    {"schema", "shapes_schema"}, {"upgrade"}, {"kernels", "db"}, {"problems"},
    {"ops", "ops_prologue"},
    {"trace", "tune", "verify", "runtime"}, {"bench"}, {"report"}, {"terminal"}, {"cli_db", "cli_verify"}, {"cli"},
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


def test_imports_go_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        for name in imported(path):
            if name == "__version__":
                continue
            assert rank[name] <= rank[stem(path)], f"{path} imports {name}"


def test_stages_do_not_import_each_other():
    stages = {"trace", "tune", "verify", "runtime"}
    for path in PACKAGE.rglob("*.py"):
        if stem(path) in stages:
            assert not (set(imported(path)) & stages) - {stem(path)}, path


def test_reference_imports_nothing_that_it_judges():
    assert set(imported(PACKAGE / "reference.py")) == {"spec"}
    assert set(imported(PACKAGE / "spec.py")) == set()


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


def test_import_touches_nothing_heavy():
    code = "import sys, int8kit; print(sorted(m for m in ('torch', 'triton', 'diffusers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_module_opens_with_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_documents_name_files_that_exist():
    for document in ROOT.glob("*.md"):
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
    yield from ((doc.name, command) for doc in ROOT.glob("*.md") for command in console(doc))
    for module in PACKAGE.glob("cli*.py"):
        for command in re.findall(r"^ +Example: (.+)$", module.read_text(), re.MULTILINE):
            yield module.name, command.strip()


@pytest.mark.parametrize(("command", "where"), {command: where for where, command in examples()}.items())
def test_commands_of_the_documents_run(command, where, tmp_path):
    """Each printed command as it stands, in an empty folder; those that need a real card or real weights parse only."""
    verb, *args = shlex.split(command)
    assert verb == "int8kit", f"{where}: {command}"
    card = "bench" in args or ("tune" in args and "--gpu" not in args)
    needs = card or "ideogram-ai/" in command
    if "tuning_db/" in command:
        shutil.copytree(files.shipped("tuning_db"), tmp_path / "tuning_db")
    if needs:
        args = [*itertools.takewhile(lambda word: word[0].isalpha(), args), "--help"]
    done = subprocess.run(
        [sys.executable, "-m", "int8kit.cli", *args], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_wheel_holds_the_shipped_files(tmp_path):
    """A wheel built from this tree finds its shapes and databases outside the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "from int8kit import db, files, trace; print(files.shipped('shapes')); db.load(db.find('rtx3090')); "
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
