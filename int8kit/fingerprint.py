"""Fingerprint of functions: a hash of everything in their package that decides their result.

    fingerprint(launch, why_not)  ->  "b504fe8ad3d2"

The walk starts at the given functions and follows every name that their source reads: functions, device functions,
classes and module constants of the same package. Nothing is listed by hand, so nothing can be forgotten.

    counts                                          does not count
    operators, numbers, strings, order              comments, layout, docstrings
    arguments, defaults, keywords, options          names of variables, functions, modules
    module constants, by their value                annotations of host code
    decorators, annotations of device code          words of errors, of warnings and of `why_not` reasons
    names of other packages' functions              the versions of other packages

A name that a caller may use in a keyword or a string counts: such a parameter is part of an interface.

The source is read as a syntax tree and written in a form of our own, since `ast.dump` differs between versions of
Python. A reference is replaced by the number of its target in the order of the walk. A hash of the compiled code was
rejected: it needs a compiler, and differs between versions of Triton.
"""

from __future__ import annotations

import ast
import builtins
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

DIGITS = 12
_SKIPPED_FIELDS = {"ctx", "kind", "type_comment", "type_params"}  # say nothing, or differ between versions of Python
_TEXT_METHODS = {"__str__", "__repr__", "__doc__"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def fingerprint(*roots: Callable[..., Any]) -> str:
    """12 hexadecimal digits for `roots` and all that they reach in their package.

    Raises OSError where the source cannot be read.
    """
    package = _plain(roots[0]).__module__.partition(".")[0]
    walk = _Walk(package)
    for root in roots:
        walk.reference(_plain(root))
    walk.run()
    return hashlib.sha256("\n".join(walk.lines()).encode()).hexdigest()[:DIGITS]


def _plain(value: Any) -> Any:
    """The Python function inside a cache, a property or a device function; anything else as it is."""
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
def _tree(value: Any) -> ast.AST:
    """The definition of a function or a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


@functools.lru_cache(maxsize=256)
def _bindings(module: ModuleType) -> dict[str, list[ast.stmt]]:
    """Statements of a module that bind a name, by name."""
    found: dict[str, list[ast.stmt]] = {}

    def add(statements: Iterable[ast.stmt]) -> None:
        for one in statements:
            for name in _bound(one):
                found.setdefault(name, []).append(one)
            for inner in ("body", "orelse", "finalbody", "handlers"):
                if not isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    add(getattr(one, inner, ()))

    path = inspect.getsourcefile(module) or ""
    linecache.checkcache(path)
    add(ast.parse("".join(linecache.getlines(path))).body)  # inspect refuses an empty file
    return found


def _bound(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.With)):
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


@dataclass(frozen=True)
class _Item:
    """Something of the package that the walk has reached."""

    kind: str  # "function", "class", "constant"
    value: Any  # the function or class; of a constant its statements
    module: ModuleType
    key: Any  # tells it from others


@dataclass
class _Walk:
    """What was reached, in the order of the walk."""

    package: str
    items: dict[Any, _Item] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)  # that reached code asks for: methods of these names count
    words: set[str] = field(default_factory=set)  # keywords and strings of reached code

    def run(self) -> None:
        """Follow references until nothing new is reached."""
        before = None
        while before != (len(self.items), len(self.attributes), len(self.words)):
            before = (len(self.items), len(self.attributes), len(self.words))
            self.lines()

    def lines(self) -> list[str]:
        """Each item's text, in order. Reaches what the texts refer to."""
        texts: list[str] = []
        while len(texts) < len(self.items):
            texts.append(_Writer(self, list(self.items.values())[len(texts)]).text())
        return texts

    def reference(self, value: Any) -> str:
        """The text that stands for a function or class of the package."""
        kind = "class" if isinstance(value, type) else "function"
        return self._number(_Item(kind, value, sys.modules[value.__module__], value))

    def name(self, module: ModuleType, name: str) -> str:
        """The text that stands for the global `name` as `module` reads it."""
        if name not in vars(module):
            return f"builtin {name}" if hasattr(builtins, name) else f"undefined {name}"
        statements = _bindings(module).get(name, [])
        if len(statements) == 1 and isinstance(statements[0], (ast.Import, ast.ImportFrom)):
            imported = self.imported(module, statements[0], name)
            if isinstance(imported, str):
                return imported
            return self.name(*imported)
        value = vars(module)[name]
        if (inner := self._ours(value)) is not None:
            return self.reference(inner)
        if (known := self.constant(value, statements)) is not None:
            return known
        if not statements:
            return f"unknown {name}"
        return self._number(_Item("constant", statements, module, (module, name)))

    def attribute(
        self, module: ModuleType, node: ast.Attribute, imports: dict[str, ast.Import | ast.ImportFrom]
    ) -> str | None:
        """The text of `module.attribute` or of an enum's member; None for the attributes of other objects.

        imports: of the function that reads it, by name.
        """
        chain: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            return None
        first, rest = inner.id, chain[::-1]
        value = vars(module).get(first)
        if len(rest) == 1 and (member := self._member(value, rest[0])):
            return member
        if first in imports:
            found = self.imported(module, imports[first], first)
        elif isinstance(value, ModuleType):
            found = self.name(module, first)
        else:
            return None
        if not isinstance(found, str):
            source, name = found
            found = self.name(source, name)
        if found.startswith("module "):
            source = sys.modules[found.removeprefix("module ")]
            if len(rest) == 2 and (member := self._member(vars(source).get(rest[0]), rest[1])):
                return member
            return ".".join((self.name(source, rest[0]), *rest[1:]))
        return ".".join((found, *rest))

    def constant(self, value: Any, statements: list[ast.stmt]) -> str | None:
        """The text of a constant by its value; None if its definition has to stand for it.

        A value stands for itself if its definition reads no name: others depend on the process. An empty container in
        the source is a cache: what it holds later decides nothing.
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
        return f"value {_canonical(held)}" if _is_plain(held) else None

    def imported(
        self, module: ModuleType, statement: ast.Import | ast.ImportFrom, name: str
    ) -> str | tuple[ModuleType, str]:
        """Another package's name in full, or the module of this package that binds it, and the name there."""
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
        return source, alias.name

    def _member(self, value: Any, name: str) -> str | None:
        """The text of a member of an enum of the package, which the other members do not change."""
        if isinstance(value, enum.EnumMeta) and self._ours(value) and name in value.__members__:
            return f"member {value.__members__[name].value!r}"
        return None

    def _ours(self, value: Any) -> Any:
        """The function or class inside `value` if it is of this package, else None."""
        inner = _plain(value)
        if not isinstance(inner, (FunctionType, type)):
            return None
        return inner if inner.__module__.partition(".")[0] == self.package else None

    def _number(self, item: _Item) -> str:
        self.items.setdefault(item.key, item)
        return f"#{list(self.items).index(item.key)}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (MappingProxyType, dict)):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, (tuple, list, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _canonical(value: Any) -> str:
    if isinstance(value, (MappingProxyType, dict)):
        return "{" + ", ".join(f"{_canonical(k)}: {_canonical(v)}" for k, v in value.items()) + "}"
    if isinstance(value, frozenset):
        return f"frozenset({', '.join(sorted(map(_canonical, value)))})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_canonical, value))})"
    if isinstance(value, enum.Enum):
        return repr(value.value)
    return repr(value)


class _Writer:
    """The text of one item, with its names replaced."""

    def __init__(self, walk: _Walk, item: _Item) -> None:
        self.walk, self.item = walk, item
        self.scopes: list[set[str]] = []
        self.locals: dict[str, str] = {}
        self.imports: dict[str, ast.Import | ast.ImportFrom] = {}  # inside a function
        self.device = False

    def text(self) -> str:
        """The item's kind and source."""
        if self.item.kind == "constant":
            return "constant " + " ".join(self._node(statement) for statement in self.item.value)
        tree = _tree(self.item.value)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports |= dict.fromkeys(_bound(node), node)
        self.device = any("jit" in ast.unparse(d) for d in getattr(tree, "decorator_list", ()))
        if isinstance(tree, ast.ClassDef):
            return self._class(tree)
        if isinstance(tree, ast.FunctionDef):
            return f"function {self._function(tree, reason=tree.name.lstrip('_').startswith('why'))}"
        return f"statement {self._node(tree)}"

    def _class(self, tree: ast.ClassDef) -> str:
        parts = [self._node(part) for part in (*tree.decorator_list, *tree.bases, *tree.keywords)]
        if issubclass(self.item.value, BaseException):
            return f"exception({', '.join(parts)})"
        for statement in _without_docstring(tree.body):
            if isinstance(statement, ast.FunctionDef):
                dunder = statement.name.startswith("__") and statement.name not in _TEXT_METHODS
                if dunder or statement.name in self.walk.attributes:
                    parts.append(f"{statement.name} {self._function(statement)}")
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                value = self._node(statement.value) if statement.value else ""
                parts.append(f"field {statement.target.id} {value}")
            else:
                parts.append(self._node(statement))
        return f"class({', '.join(parts)})"

    def _function(self, tree: ast.FunctionDef, reason: bool = False) -> str:
        """Decorators, parameters and body. reason: a returned text is a reason, whose words decide nothing."""
        decorators = [self._node(decorator) for decorator in tree.decorator_list]
        with self._scope(tree):
            arguments = self._arguments(tree.args)
            body = [self._statement(s, reason) for s in _without_docstring(tree.body)]
        return f"({' '.join(decorators)})({arguments}){{{'; '.join(filter(None, body))}}}"

    def _scope(self, tree: ast.AST) -> _Scope:
        return _Scope(self.scopes, _names_of(tree))

    def _arguments(self, arguments: ast.arguments) -> str:
        parts = []
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a]
        for one in every:
            kind = self._node(one.annotation) if self.device and one.annotation else ""
            parts.append(f"{self._local(one.arg, parameter=True)}:{kind}")
        counts = len(arguments.posonlyargs), len(arguments.args), len(arguments.kwonlyargs)
        flags = bool(arguments.vararg), bool(arguments.kwarg)
        defaults = [self._node(d) if d else "" for d in (*arguments.defaults, *arguments.kw_defaults)]
        return f"{counts}{flags} {', '.join(parts)} = {', '.join(defaults)}"

    def _local(self, name: str, parameter: bool = False) -> str:
        """A number for a variable; a parameter that somebody may pass by its name keeps that."""
        if name not in self.locals:
            known = parameter and name in self.walk.words
            self.locals[name] = f"parameter {name}" if known else f"v{len(self.locals)}"
        return self.locals[name]

    def _statement(self, node: ast.stmt, reason: bool) -> str:
        if isinstance(node, ast.Return) and reason and isinstance(node.value, (ast.JoinedStr, ast.Constant)):
            return "Return None" if getattr(node.value, "value", "") is None else "Return reason"
        if reason and isinstance(node, (ast.If, ast.For, ast.With)):
            head = [self._node(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
            body = [self._statement(child, reason) for child in node.body]
            rest = [self._statement(child, reason) for child in getattr(node, "orelse", ())]
            return f"{type(node).__name__}({', '.join(head)})({'; '.join(body)})({'; '.join(rest)})"
        return self._node(node)

    def _node(self, node: Any) -> str:
        special = getattr(self, f"_on_{type(node).__name__}", None)
        if special is not None:
            return str(special(node))
        if isinstance(node, _SCOPES):
            with self._scope(node):
                return self._plain(node)
        return self._plain(node)

    def _plain(self, node: ast.AST) -> str:
        parts = []
        for name, value in ast.iter_fields(node):
            if name in _SKIPPED_FIELDS or value is None or value == []:
                continue
            if isinstance(value, list):
                parts.append(f"{name}=[{', '.join(filter(None, map(self._node, value)))}]")
            elif isinstance(value, ast.AST):
                parts.append(f"{name}={self._node(value)}")
            else:
                parts.append(f"{name}={value!r}")
        return f"{type(node).__name__}({', '.join(parts)})"

    def _on_FunctionDef(self, node: ast.FunctionDef) -> str:  # noqa: N802  named after the node
        return f"Function {self._local(node.name)} {self._function(node)}"

    def _on_Lambda(self, node: ast.Lambda) -> str:  # noqa: N802
        with self._scope(node):
            return f"Lambda({self._arguments(node.args)}: {self._node(node.body)})"

    def _on_Name(self, node: ast.Name) -> str:  # noqa: N802
        if any(node.id in scope for scope in self.scopes):
            return self._local(node.id)
        if not isinstance(node.ctx, ast.Load):
            return "target"
        if node.id in self.imports:
            found = self.walk.imported(self.item.module, self.imports[node.id], node.id)
            return found if isinstance(found, str) else self.walk.name(*found)
        return self.walk.name(self.item.module, node.id)

    def _on_Attribute(self, node: ast.Attribute) -> str:  # noqa: N802
        root: ast.AST = node
        while isinstance(root, ast.Attribute):
            root = root.value
        local = isinstance(root, ast.Name) and any(root.id in scope for scope in self.scopes)
        if not local and (found := self.walk.attribute(self.item.module, node, self.imports)) is not None:
            return found
        self.walk.attributes.add(node.attr)
        return f"{self._node(node.value)}.{node.attr}"

    def _on_Constant(self, node: ast.Constant) -> str:  # noqa: N802
        if isinstance(node.value, str):
            self.walk.words.add(node.value)
        return repr(node.value)

    def _on_keyword(self, node: ast.keyword) -> str:
        if node.arg:
            self.walk.words.add(node.arg)
        return f"{node.arg}={self._node(node.value)}"

    def _on_AnnAssign(self, node: ast.AnnAssign) -> str:  # noqa: N802
        kind = self._node(node.annotation) if self.device else ""
        return f"{self._node(node.target)}:{kind}={self._node(node.value) if node.value else ''}"

    def _on_Raise(self, node: ast.Raise) -> str:  # noqa: N802
        return "Raise"

    def _on_Import(self, node: ast.Import) -> str:  # noqa: N802  names are followed where they are read
        return ""

    _on_ImportFrom = _on_Import  # noqa: N815

    def _on_Assert(self, node: ast.Assert) -> str:  # noqa: N802
        return f"Assert({self._node(node.test)})"

    def _on_Expr(self, node: ast.Expr) -> str:  # noqa: N802
        if isinstance(node.value, ast.Constant):
            return ""  # a text that stands alone
        if isinstance(node.value, ast.Call) and self._node(node.value.func) == "external warnings.warn":
            return ""
        return self._node(node.value)

    def _on_ExceptHandler(self, node: ast.ExceptHandler) -> str:  # noqa: N802
        name = self._local(node.name) if node.name else ""
        kind = self._node(node.type) if node.type else ""
        return f"except {kind} {name} [{', '.join(filter(None, map(self._node, node.body)))}]"


class _Scope:
    """A context in which the names of one scope are local."""

    def __init__(self, scopes: list[set[str]], names: set[str]) -> None:
        self.scopes, self.names = scopes, names

    def __enter__(self) -> None:
        self.scopes.append(self.names)

    def __exit__(self, *_: object) -> None:
        self.scopes.pop()


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:]
    return body


def _names_of(scope: ast.AST) -> set[str]:
    """Names that are local in a function, a lambda or a comprehension; not in the scopes inside it."""
    names: set[str] = set()
    free: set[str] = set()
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        a = scope.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(one for one in (a.vararg, a.kwarg) if one)]
        names |= {one.arg for one in every}
        inner: list[ast.AST] = list(scope.body) if isinstance(scope.body, list) else [scope.body]
    else:
        inner = list(ast.iter_child_nodes(scope))
    while inner:
        node = inner.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, _SCOPES):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            free |= set(node.names)
        inner.extend(ast.iter_child_nodes(node))
    return names - free
