"""Canonical text of a definition: everything that decides its result, in a form that names and words do not change.

    text(tree, module, resolver)  ->  "function ()((0, 2, 0)(False, False) v0:, v1: = ){Return(value=...)}"

Variables are numbered in the order of their first use. Every other name is replaced by the resolver's text for it.
Comments, docstrings, annotations of host code, and the words of errors, warnings and reasons are left out.

`ast.dump` was rejected: its text differs between versions of Python.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

Imports = dict[str, ast.Import | ast.ImportFrom]
"""Imports inside a function, by the names that they bind."""

_SKIPPED_FIELDS = {
    "ctx",
    "kind",
    "type_comment",
    "type_params",
}  # without meaning, or different between versions of Python
_TEXT_METHODS = {"__str__", "__repr__", "__doc__"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Resolver(Protocol):
    """Knows the names that a definition reads, and records attributes and words that the code uses."""

    attributes: set[str]  # names that the code reads from objects: methods with these names count
    words: set[str]  # keywords and strings of the code: parameters with these names are passed by name

    def name(self, module: ModuleType, name: str) -> str:
        """The text of a global name."""

    def attribute(self, module: ModuleType, first: str, rest: list[str], imports: Imports) -> str | None:
        """The text of a module's attribute; None for the attributes of other objects."""

    def imported(self, module: ModuleType, statement: ast.Import | ast.ImportFrom, name: str) -> str:
        """The text of a name that an import inside a function binds."""


def text(tree: ast.stmt, module: ModuleType, resolver: Resolver) -> str:
    """The text of a function, a class or an assignment of `module`."""
    return _Writer(tree, module, resolver).text()


def imported_names(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """The names that an import binds."""
    return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]


class _Writer:
    """The text of one item, with its names replaced."""

    def __init__(self, tree: ast.stmt, module: ModuleType, resolver: Resolver) -> None:
        self.tree, self.module, self.resolver = tree, module, resolver
        self.scopes: list[set[str]] = []
        self.locals: dict[str, str] = {}
        nodes = list(ast.walk(tree)) if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else []
        imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.imports: Imports = {name: one for one in imports for name in imported_names(one)}
        self.device = any("jit" in ast.unparse(decorator) for decorator in getattr(tree, "decorator_list", ()))

    def text(self) -> str:
        """The kind of the definition and its source."""
        if isinstance(self.tree, ast.ClassDef):
            return self._class(self.tree)
        if isinstance(self.tree, ast.FunctionDef):
            return f"function {self._function(self.tree, reason=self.tree.name.lstrip('_').startswith('why'))}"
        return f"constant {self._node(self.tree)}"

    def _class(self, tree: ast.ClassDef) -> str:
        parts = [self._node(part) for part in (*tree.decorator_list, *tree.bases, *tree.keywords)]
        if self._is_exception(tree):
            return f"exception({', '.join(parts)})"
        for statement in _without_docstring(tree.body):
            if isinstance(statement, ast.FunctionDef):
                dunder = statement.name.startswith("__") and statement.name not in _TEXT_METHODS
                if dunder or statement.name in self.resolver.attributes:
                    parts.append(f"{statement.name} {self._function(statement)}")
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                value = self._node(statement.value) if statement.value else ""
                parts.append(f"field {statement.target.id} {value}")
            else:
                parts.append(self._node(statement))
        return f"class({', '.join(parts)})"

    def _function(self, tree: ast.FunctionDef, reason: bool = False) -> str:
        """Decorators, parameters and body. reason: the function returns reasons, whose words decide nothing."""
        decorators = [self._node(decorator) for decorator in tree.decorator_list]
        with self._scope(tree):
            arguments = self._arguments(tree.args)
            body = [self._statement(s, reason) for s in _without_docstring(tree.body)]
        return f"({' '.join(decorators)})({arguments}){{{'; '.join(filter(None, body))}}}"

    def _is_exception(self, tree: ast.ClassDef) -> bool:
        value = vars(self.module).get(tree.name)
        return isinstance(value, type) and issubclass(value, BaseException)

    @contextmanager
    def _scope(self, tree: ast.AST) -> Iterator[None]:
        """A context in which the names of one scope are local."""
        self.scopes.append(_names_of(tree))
        try:
            yield
        finally:
            self.scopes.pop()

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
        """A number for a variable; a parameter that may be passed by name keeps its name."""
        if name not in self.locals:
            known = parameter and name in self.resolver.words
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
        if not self.scopes and not isinstance(node.ctx, ast.Load):
            return "target"  # what a module's own statement binds: its name says nothing
        if node.id in self.imports:
            return self.resolver.imported(self.module, self.imports[node.id], node.id)
        return self.resolver.name(self.module, node.id)

    def _on_Attribute(self, node: ast.Attribute) -> str:  # noqa: N802
        chain: list[str] = []
        root: ast.AST = node
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and not any(root.id in scope for scope in self.scopes):
            found = self.resolver.attribute(self.module, root.id, chain[::-1], self.imports)
            if found is not None:
                return found
        self.resolver.attributes.add(node.attr)
        return f"{self._node(node.value)}.{node.attr}"

    def _on_Constant(self, node: ast.Constant) -> str:  # noqa: N802
        if isinstance(node.value, str):
            self.resolver.words.add(node.value)
        return repr(node.value)

    def _on_keyword(self, node: ast.keyword) -> str:
        if node.arg:
            self.resolver.words.add(node.arg)
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
