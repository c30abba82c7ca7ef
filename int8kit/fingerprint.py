"""Fingerprint of functions: a hash of everything in their package that decides the result.

    fingerprint(launch, why_not)  ->  "b504fe8ad3d2"

The walk starts at the given functions and follows every name that their source reads: functions, device functions,
classes and module constants of the same package. Nothing is listed by hand, so nothing can be forgotten.

    counts                                          does not count
    operators, numbers, strings, order              comments, layout, docstrings
    arguments, defaults, keywords, options          names of variables, functions, modules
    module constants, by their value                annotations of host code
    decorators, annotations of device code          words of errors, of warnings and of `why_not` reasons
    names of other packages' functions              the versions of other packages

A name that a caller may use as a keyword or in a string counts: such a parameter is part of an interface.

A reference is replaced by the number of its target in the order of the walk. `canonical` writes the source. A hash of
the compiled code was rejected: it needs a compiler, and it differs between versions of Triton.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import importlib.util
import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from int8kit import canonical

DIGITS = 12
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def fingerprint(*roots: Callable[..., Any]) -> str:
    """12 hexadecimal digits for `roots` and all that they reach in their package.

    Raises OSError where the source cannot be read.
    """
    walk = _Walk(_plain(roots[0]).__module__.partition(".")[0])
    for root in roots:
        walk.value(_plain(root))
    walk.run()
    return hashlib.sha256("\n".join(walk.texts()).encode()).hexdigest()[:DIGITS]


def _plain(value: Any) -> Any:
    """The Python function inside a cache, a property or a device function; any other value unchanged."""
    while not isinstance(value, (FunctionType, type, ModuleType)):
        if isinstance(value, functools.cached_property):
            inner: Any = value.func
        else:
            names = (name for name in ("fn", "__wrapped__", "fget", "__func__") if name in dir(value))
            inner = next((getattr(value, name) for name in names), None)
        if not callable(inner):
            return value
        value = inner
    return value


@functools.lru_cache(maxsize=512)
def _tree(value: Any) -> ast.stmt:
    """The definition of a function or a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


@functools.lru_cache(maxsize=256)
def _bindings(module: ModuleType) -> dict[str, list[ast.stmt]]:
    """Statements of a module that bind a name, by name; a condition around an assignment is taken whole."""
    found: dict[str, list[ast.stmt]] = {}

    def add(statements: Iterable[ast.stmt], around: ast.stmt | None) -> None:
        for one in statements:
            for name in _bound(one):
                alone = around is None or isinstance(one, (*_DEFINITIONS, ast.Import, ast.ImportFrom))
                whole = one if alone or around is None else around
                if whole not in found.setdefault(name, []):
                    found[name].append(whole)
            if not isinstance(one, _DEFINITIONS):
                for inner in ("body", "orelse", "finalbody", "handlers"):
                    add(getattr(one, inner, ()), around or one)

    path = inspect.getsourcefile(module) or ""
    linecache.checkcache(path)
    add(ast.parse("".join(linecache.getlines(path))).body, None)  # inspect refuses an empty file
    return found


def _bound(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, _DEFINITIONS):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from canonical.imported_names(statement)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


@dataclass(frozen=True)
class _Item:
    """A definition of the package that the walk has reached."""

    statements: tuple[ast.stmt, ...]
    module: ModuleType


@dataclass
class _Walk:
    """Definitions that were reached, in the order of the walk, by module and name or by value."""

    package: str
    items: dict[Any, _Item] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)  # see `canonical.Resolver`
    words: set[str] = field(default_factory=set)  # likewise

    def run(self) -> None:
        """Follow references until nothing new is reached."""
        before = None
        while before != (len(self.items), len(self.attributes), len(self.words)):
            before = (len(self.items), len(self.attributes), len(self.words))
            self.texts()

    def texts(self) -> list[str]:
        """Each item's text, in order. Reaches what the texts refer to."""
        found: list[str] = []
        while len(found) < len(self.items):
            item = list(self.items.values())[len(found)]
            found.append(" ".join(canonical.text(one, item.module, self) for one in item.statements))
        return found

    def value(self, value: Any) -> str:
        """The text that stands for a function or a class of the package, by its own source."""
        return self._number(value, _Item((_tree(value),), sys.modules[value.__module__]))

    def name(self, module: ModuleType, name: str) -> str:
        """The text that stands for the global `name` as `module` reads it."""
        if name not in vars(module):
            return f"builtin {name}"
        statements = _bindings(module).get(name, [])
        if len(statements) == 1 and isinstance(statements[0], (ast.Import, ast.ImportFrom)):
            return self.imported(module, statements[0], name)
        value = vars(module)[name]
        if (known := _constant(value, statements)) is not None:
            return known
        text = self._number((module, name), _Item(tuple(statements), module)) if statements else f"unknown {name}"
        if len(statements) == 1 and isinstance(statements[0], _DEFINITIONS):
            inner = _plain(value)
            if getattr(inner, "__name__", name) != name or getattr(inner, "__module__", "") != module.__name__:
                text += f" made {self._made(inner)}"  # a decorator's function, or another put in its place
        return text

    def attribute(self, module: ModuleType, first: str, rest: list[str], imports: canonical.Imports) -> str | None:
        """The text of `module.attribute` or of an enum's member; None for the attributes of other objects.

        imports: of the function that reads it, by name.
        """
        value = vars(module).get(first)
        if len(rest) == 1 and (member := self._member(value, rest[0])):
            return member
        if first in imports:
            found = self.imported(module, imports[first], first)
        elif isinstance(value, ModuleType):
            found = self.name(module, first)
        else:
            return None
        if found.startswith("module "):
            source = sys.modules[found.removeprefix("module ")]
            if len(rest) == 2 and (member := self._member(vars(source).get(rest[0]), rest[1])):
                return member
            return ".".join((self.name(source, rest[0]), *rest[1:]))
        return ".".join((found, *rest))

    def imported(self, module: ModuleType, statement: ast.Import | ast.ImportFrom, name: str) -> str:
        """The text of an imported name: another package's in full, this package's by its definition."""
        alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
        if isinstance(statement, ast.Import):
            kind = "module" if alias.name.partition(".")[0] == self.package else "external"
            return f"{kind} {alias.name if alias.asname else name}"
        origin = statement.module or ""
        if statement.level:
            origin = importlib.util.resolve_name("." * statement.level + origin, module.__package__)
        if origin.partition(".")[0] != self.package:
            return f"external {origin}.{alias.name}"
        source = importlib.import_module(origin)
        if alias.name not in vars(source) or alias.name not in _bindings(source):
            return f"module {importlib.import_module(f'{origin}.{alias.name}').__name__}"
        return self.name(source, alias.name)

    def _made(self, value: Any) -> str:
        if isinstance(value, (FunctionType, type)) and value.__module__.partition(".")[0] == self.package:
            return self.value(value)
        return f"external {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"

    def _member(self, value: Any, name: str) -> str | None:
        """The text of a member of an enum of the package, which the other members do not change."""
        if isinstance(value, enum.EnumMeta) and value.__module__.partition(".")[0] == self.package:
            return f"member {value.__members__[name].value!r}" if name in value.__members__ else None
        return None

    def _number(self, key: Any, item: _Item) -> str:
        self.items.setdefault(key, item)
        return f"#{list(self.items).index(key)}"


def _constant(value: Any, statements: list[ast.stmt]) -> str | None:
    """The text of a constant by its value; None if its definition must represent it.

    A value represents itself if its definition reads no name; other values depend on the process. An empty container in
    the source is a cache, and its later content decides nothing.
    """
    expression = getattr(statements[0], "value", None) if len(statements) == 1 else None
    held = value
    if isinstance(expression, ast.Call):
        if not expression.args and not expression.keywords:
            return "cache"
        if type(value).__name__ != "constexpr" or len(expression.args) != 1:
            return None
        held, expression = value.value, expression.args[0]
    if isinstance(expression, (ast.Dict, ast.List, ast.Set)) and not list(ast.iter_child_nodes(expression)):
        return "cache"
    if expression is None or any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(expression)):
        return None
    return f"value {_written(held)}" if _is_plain(held) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (MappingProxyType, dict)):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _written(value: Any) -> str:
    if isinstance(value, (MappingProxyType, dict)):
        return "{" + ", ".join(f"{_written(k)}: {_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_written, value))})"
    return repr(value.value if isinstance(value, enum.Enum) else value)
