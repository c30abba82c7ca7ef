"""Promises of the documents: files that they name, commands and Python that they print, lists that they give."""

import pkgutil
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from test_project import EXPORTED, LAYERS

import int8kit
from int8kit import errors, files
from int8kit.cli import main
from int8kit.database import schema
from int8kit.lookup import LEVELS as LEVELS_OF_LOOKUP
from int8kit.spec import TileConfig
from int8kit.verify.mutation.catalogue import CATALOGUE
from int8kit.verify.properties.registry import PROPERTIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "int8kit"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_the_documents_are_found():
    found = {path.name for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "architecture.md", "python.md", "tutorial.md"} <= found


def test_documents_name_files_that_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} -> {target}"
        for path in paths_in_code(document.read_text()):
            assert list(ROOT.glob(path)), f"{document.name} names {path}"


def paths_in_code(text):
    """Paths of the repository in inline code, alone or among other words. A path with a placeholder is left out."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        for word in code.split():
            if re.fullmatch(r"(?:int8kit|tests|tools|docs|shapes|tuning_db)/[\w./*-]+", word):
                yield word


def test_paths_are_found_in_code():
    text = (
        "`tools/a.py`, `int8kit tune --shapes\nshapes/b.json -o out/shapes/c.json`, `tuning_db/<gpu>.json`, `./docs/d`"
    )
    assert list(paths_in_code(text)) == ["tools/a.py", "shapes/b.json"]


def blocks(document, *languages):
    """The code blocks of a document in one of `languages`."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", document.read_text(), re.DOTALL)


def commands(block):
    """The int8kit commands of a console block, with their continuation lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [
        line.removeprefix("$ ").split("  #")[0].strip() for line in lines if re.match(r"(\$ )?int8kit ", line.strip())
    ]


def examples():
    """Every printed command and the file that prints it."""
    for document in DOCUMENTS:
        yield from ((document.name, c) for block in blocks(document, "console", "sh", "bash") for c in commands(block))
    for module in (PACKAGE / "cli").glob("*.py"):
        for command in re.findall(r"^ +Example: (.+)$", module.read_text(), re.MULTILINE):
            yield module.name, command.strip()


def parsed(command):
    """(verb with its subcommand, options given) of a command. Raises KeyError or a usage error if it is wrong."""
    program, *words = shlex.split(command)
    node = typer.main.get_command(main.app)
    verb = [program]
    while getattr(node, "commands", None) and words and not words[0].startswith("-"):
        verb.append(words.pop(0))
        node = node.commands[verb[-1]]
    try:
        context = node.make_context(verb[-1], words)
    except typer.Exit:  # after --help
        return " ".join(verb), {"--help"}
    given = [p for p in node.params if getattr(context.get_parameter_source(p.name), "name", "") == "COMMANDLINE"]
    return " ".join(verb), {option for p in given for option in (*p.opts, *p.secondary_opts) if option[0] == "-"}


def printed():
    for command, where in {command: where for where, command in examples()}.items():
        yield pytest.param(command, where)


@pytest.mark.parametrize(("command", "where"), list(printed()))
def test_commands_of_the_documents_parse(command, where, capsys):
    verb, options = parsed(command)
    assert command.startswith(verb)
    assert {word.partition("=")[0] for word in shlex.split(command) if word.startswith("-")} <= options


@pytest.mark.parametrize("command", ["int8kit paint", "int8kit db paint", "int8kit tune --gpux a", "int8kit run a b"])
def test_a_wrong_command_does_not_parse(command):
    with pytest.raises((KeyError, typer.BadParameter.__base__)):
        parsed(command)


MINUTES = ("int8kit verify mutate", "int8kit verify libraries")
"""Commands that take minutes. test_mutate.py and test_implementations.py run parts of their work."""


def only_parses(command):
    """Whether a command needs a GPU, real weights or minutes, or does not exist yet."""
    words = command.split()
    gpu = "bench" in words or ("tune" in words and "--gpu" not in words)
    return gpu or "ideogram-ai/" in command or command.startswith(MINUTES)


MARKS = {"run": ["slow"], "trace-shapes": ["slow"], "tune": ["slow", "process"]}
"""Marks by verb. In the group of test_cli.py a second tuner finds compiled kernels of the first."""
ELSEWHERE = {"int8kit verify --gpu rtx3090": "test_cli.py", "int8kit doctor": "test_doctor.py"}
"""Commands that another test module runs as they stand, and checks further."""


def of_the_command_line():
    """The examples of `--help` texts."""
    for command, where in {command: where for where, command in examples() if where.endswith(".py")}.items():
        if not only_parses(command) and command not in ELSEWHERE:
            marks = [getattr(pytest.mark, name) for name in MARKS.get(command.split()[1], ())]
            yield pytest.param(command, where, marks=[*marks, pytest.mark.xdist_group("workshop")] if marks else [])


def run_as_printed(command, verb):
    """Run a command as it stands. `doctor` answers 1 where a verb that needs a GPU cannot work."""
    missing = command.startswith("int8kit doctor") and not torch.cuda.is_available()
    out, _ = verb(*shlex.split(command)[1:], status=int(missing))
    if command.split()[1] in ("tune", "trace-shapes", "run"):
        assert "wrote" in out


def clone(folder):
    """The shipped files in `folder`, as a clone has them."""
    for name in ("shapes", "tuning_db"):
        shutil.copytree(files.shipped(name), folder / name)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for name in ("shapes", "tuning_db")
            for path in sorted((folder / name).rglob("*")) if path.is_file()}  # fmt: skip


def test_commands_that_other_tests_run_are_there():
    assert set(ELSEWHERE) <= {command for _, command in examples()}
    for command, name in ELSEWHERE.items():
        assert f'"{command}"' in (Path(__file__).parent / name).read_text()


@pytest.mark.parametrize(("command", "where"), list(of_the_command_line()))
def test_examples_of_the_command_line_run(command, where, tmp_path, monkeypatch, verb):
    """Each example as it stands, in a folder of its own. A database that it reads is the shipped one."""
    if "tuning_db/" in command:
        clone(tmp_path)
    if re.match(r"int8kit db \w+ out/rtx3090.json", command):
        (tmp_path / "out").mkdir()
        shutil.copy(ROOT / "tuning_db" / "rtx3090.json", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run_as_printed(command, verb)


README = [commands(block) for block in blocks(ROOT / "README.md", "sh")]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.xdist_group("workshop")
@pytest.mark.parametrize("block", range(len(README)))
@pytest.mark.parametrize("place", ["empty", "clone"])
def test_commands_of_the_readme_run_in_order(place, block, tmp_path, monkeypatch, verb):
    """Each block of the README in an empty folder and in a clone, whose committed files stay as they are."""
    if place == "clone":
        clone(tmp_path)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in README[block]:
        if not only_parses(command) and command not in ELSEWHERE:
            run_as_printed(command, verb)
    assert contents(tmp_path) == before


def test_blocks_of_the_readme_are_found():
    assert [len(block) for block in README] == [0, 2, 3, 6]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_python_of_the_readme_runs():
    [block] = blocks(ROOT / "README.md", "python")
    names = {}
    exec(block, names)
    assert names["image"].size == (64, 64)
    assert isinstance(names["pipe"].transformer.layers[0].feed_forward.w1, int8kit.Int8Linear)


@pytest.mark.parametrize("page", ["python", "verification"])
def test_python_of_the_pages_runs(page):
    found = blocks(ROOT / "docs" / f"{page}.md", "python")
    assert found
    for block in found:
        exec(block, {})


def test_pages_describe_the_code():
    """What a page lists is what the code has."""
    page = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    for name in {*EXPORTED, "errors"} - {"__version__", *vars(errors)}:
        assert re.search(rf"^::: int8kit\.[\w.]*\b{name}$", page["python"], re.MULTILINE), name
    for model in (schema.Document, schema.Entry, schema.Stamp, schema.GpuIdentity, schema.Resources, schema.GpuState):
        for name in model.model_fields:
            assert f"`{name}`" in page["database-format"], name
    for name in [field.name for field in fields(TileConfig)]:
        assert f"`{name}`" in page["database-format"], name
    for name in {*PROPERTIES, "entries"}:
        assert f"`{name}`" in page["verification"], name
    assert [level.name for level in LEVELS_OF_LOOKUP] == re.findall(
        r"^\| `([a-z-]+)` \| (?:an|the|`)", page["architecture"], re.M
    )
    names = set(re.findall(r"`(int8kit(?:\.\w+)+)`", page["architecture"]))
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(name)


def test_the_page_on_architecture_shows_the_import_layers():
    [block] = blocks(ROOT / "docs" / "architecture.md", "layers")
    assert [set(line.split()) for line in block.splitlines()] == [layer for layer in LAYERS if layer != {"__main__"}]


def test_documents_count_the_faults():
    found = [n for path in DOCUMENTS for n in re.findall(r"\b(\d+) (?:seeded )?faults", path.read_text())]
    assert len(found) >= 3
    assert set(map(int, found)) == {len(CATALOGUE)}
