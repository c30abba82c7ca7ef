"""Plain technical English: short sentences and one word for one thing, in documents, docstrings and messages."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "int8kit"
LONGEST = 30  # words of a sentence
README_LONGEST = 600  # words of the README, code and table included
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]  # docs/results are records of their day
FORBIDDEN = (
    (re.compile(r"(?<!\")\bcards?\b(?!\")", re.IGNORECASE), "write GPU; as a key of a published file, quote it"),
    (re.compile(r"\blegal\s+(is|are)\b", re.IGNORECASE), "write 'expected ...'"),
)
IN_DOCUMENTS = tuple(
    (re.compile(rf"\b{phrase}\b", re.IGNORECASE), remedy)
    for phrase, remedy in (
        ("the like", "name the things"),
        ("(reckons?|tells?)", "write estimates, reports, shows"),
        ("(is|are) off", "name the error"),
        ("those of", "repeat the noun"),
        ("of (its|their) own", "write own before the noun"),
        ("came to", "write was"),
    )
)


class Line(NamedTuple):
    """A line of text and its number in the file."""

    number: int
    text: str


def paragraphs_of_markdown(text):
    """Runs of prose lines. Fenced and indented code, tables, headings and HTML comments are left out."""
    fenced, found = False, [[]]
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith("```"):
            fenced = not fenced
        if (
            fenced
            or not bare
            or re.match(r"```|\||#|<!--|:::|!!!", bare)
            or (line.startswith("    ") and not found[-1])
        ):
            found.append([])
            continue
        if re.match(r"([-*]|\d+\.) ", bare):  # an item of a list
            found.append([])
            bare = re.sub(r"^([-*]|\d+\.) ", "", bare)
        found[-1].append(Line(number, bare))
    return [paragraph for paragraph in found if paragraph]


def paragraphs_of_docstring(text, first, margin):
    """Runs of prose lines of a docstring at line `first` and column `margin`. Lines indented further are left out."""
    found = [[]]
    for number, line in enumerate(text.expandtabs().splitlines(), first):
        indent = len(line) - len(line.lstrip()) if number > first else margin
        if not line.strip() or indent > margin or line.strip().startswith((">>>", "+--", "|")):
            found.append([])
        else:
            found[-1].append(Line(number, line.strip()))
    return [paragraph for paragraph in found if paragraph]


def sentences(paragraph):
    """[(line number, words)] of a paragraph; a piece of inline code counts as one word."""
    words = []
    joined = re.sub(
        r"`[^`]*`", lambda code: re.sub(r"[^\n]", "", code[0]) + "code", "\n".join(p.text for p in paragraph)
    )
    for line, text in zip(paragraph, joined.split("\n"), strict=True):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        words += [(line.number, word) for word in plain.split()]
    found, start = [], 0
    for i, (_, word) in enumerate(words):
        ends = re.search(r"[.!?][)\"'*]*$", word) and word.lower() not in ("e.g.", "i.e.", "vs.")
        if ends or i + 1 == len(words):
            text = [w for _, w in words[start : i + 1] if re.search(r"\w", w)]
            found.append((words[start][0], text))
            start = i + 1
    return found


def too_long(paragraphs):
    """[(line number, complaint)] for each sentence of more than LONGEST words."""
    return [
        (number, f"{len(words)} words: {' '.join(words[:8])} ...")
        for paragraph in paragraphs
        for number, words in sentences(paragraph)
        if len(words) > LONGEST
    ]


def forbidden(lines, rules=FORBIDDEN):
    """[(line number, complaint)] for each forbidden word."""
    return [
        (number, f"{match[0]!r}: {remedy}")
        for number, text in lines
        for pattern, remedy in rules
        if (match := pattern.search(text))
    ]


def complaints_of_document(text):
    lines = list(enumerate(text.splitlines(), 1))
    return [*too_long(paragraphs_of_markdown(text)), *forbidden(lines, FORBIDDEN + IN_DOCUMENTS)]


SPEAKING = {"note", "print", "warn", "fail", "Option", "Argument", "Typer"}
"""Functions whose texts a user reads, beside the errors that are raised."""


def messages(tree):
    """[(line number, text)] of texts in raised errors and in calls of SPEAKING; a value in an f-string is one word."""
    speaking = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in SPEAKING)
    ]
    for node in {inner for outer in speaking for inner in ast.walk(outer)}:
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(part.value if isinstance(part, ast.Constant) else "value" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def complaints_of_module(source):
    """Long sentences in docstrings and messages; forbidden words in docstrings, comments and all other texts."""
    tree, found = ast.parse(source), []
    for number, text in messages(tree):
        found += too_long([[Line(number, text.replace("\n", " "))]])
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            constant = node.body[0].value
            found += too_long(paragraphs_of_docstring(constant.value, constant.lineno, constant.col_offset))
    return found + forbidden(enumerate(source.splitlines(), 1))


def covered():
    return sorted(PACKAGE.rglob("*.py"))


def report(complaints):
    """One text, a line for each complaint: file:line: what."""
    return "\n".join(f"{path.relative_to(ROOT)}:{n}: {what}" for path, found in complaints for n, what in sorted(found))


def test_documents_are_plain():
    assert len(DOCUMENTS) >= 12
    assert report((path, complaints_of_document(path.read_text())) for path in DOCUMENTS) == ""


def test_modules_are_plain():
    assert len(covered()) > 100
    assert report((path, complaints_of_module(path.read_text())) for path in covered()) == ""


def test_readme_is_short():
    words = (ROOT / "README.md").read_text().split()
    assert len(words) <= README_LONGEST


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word " * 30 + ".", []),
        ("word " * 31 + ".", [1]),
        ("Short one.\n\nBegins here,\n" + "word " * 29 + "end.", [3]),
        ("Short. " + "word " * 20 + "end. " + "word " * 20 + "end.", []),
        ("- " + "item " * 20 + "\n- " + "item " * 20, []),
        ("```sh\n" + "code " * 40 + "\n```\n", []),
        ("| " + "cell " * 40 + "|", []),
        ("    " + "code " * 40, []),
        ("`" + "code " * 40 + "` is one word.", []),
        ("[" + "word " * 40 + "](target)", [1]),
        ("Put it\ninto the card.", [2]),
        ("A discarded cardinal.", []),
        ("expected: 3; legal are 4", [1]),
        ("A legal tile is fast.", []),
        ("Tiles, stages and the like.", [1]),
        ("The call is off.", [1]),
    ],
)
def test_the_rules_for_documents(text, expected):
    assert [number for number, _ in complaints_of_document(text)] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""' + "word " * 31 + '"""', [1]),
        ('"""Short.\n\n    ' + "code " * 31 + '\n"""', []),
        ('"""Short."""\ndef f():\n    """Short.\n\n    Begins here\n    ' + "word " * 30 + '\n    """', [5]),
        ('"""Short."""\nraise ValueError("legal is 3")', [2]),
        ('"""Short."""\nraise ValueError("' + "word " * 31 + '")', [2]),
        ('"""Short."""\nraise ValueError(f"{name}: ' + "word " * 30 + '")', [2]),
        ('"""Short."""\nraise ValueError("' + "word " * 20 + "end. " + "word " * 20 + '")', []),
        ('"""Short."""\nx = typer.Option(help="' + "word " * 31 + '")', [2]),
        ('"""Short."""\nx = 1  # of the card', [2]),
        ('"""Short."""\nx = "' + "word " * 40 + '"', []),
    ],
)
def test_the_rules_for_modules(source, expected):
    assert [number for number, _ in complaints_of_module(source)] == expected
