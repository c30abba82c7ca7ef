"""A source file with its syntax tree: positions of nodes in bytes, enclosing functions, names that are bound."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from int8kit.verify.mutation import sources

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Parsed:
    """One file of the package. Positions are byte offsets, as in the syntax tree."""

    def __init__(self, file: str, text: str) -> None:
        """file: a path within the package."""
        self.file, self.bytes, self.tree = file, text.encode(), ast.parse(text)
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.attributes = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        self._names: dict[ast.AST, list[tuple[int, str]]] = {}

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The first byte of a node, and the byte after its last."""
        first, last = node.lineno, node.end_lineno  # type: ignore[attr-defined]
        return self.starts[first - 1] + node.col_offset, self.starts[last - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def between(self, start: int, end: int) -> str:
        """The text of a range of bytes."""
        return self.bytes[start:end].decode()

    def whole_span(self, statement: ast.AST) -> tuple[int, int]:
        """The whole lines of a statement, with its decorators."""
        decorators = getattr(statement, "decorator_list", [])
        first = min(one.lineno for one in (statement, *decorators))
        return self.starts[first - 1], self.starts[statement.end_lineno]  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        """The source of a node."""
        return self.between(*self.span(node))

    def text_in_parentheses(self, node: ast.AST) -> str:
        """The source of an operand; in parentheses if it is no single term."""
        single = isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.Subscript, ast.Tuple))
        return self.text(node) if single else f"({self.text(node)})"

    def closing(self, at: int) -> int:
        """Number of bytes up to and with the parentheses that close after byte `at`, as in `f((a), b)`."""
        count = 0
        while self.bytes[at + count : at + count + 1] == b")":
            count += 1
        return count

    def line(self, at: int) -> int:
        """The number of the line that holds byte `at`, from 1."""
        return self.bytes.count(b"\n", 0, at) + 1

    def line_text(self, number: int) -> str:
        """Line `number`, without spaces around it."""
        return self.between(self.starts[number - 1], self.starts[number]).strip()

    def up(self, node: ast.AST) -> Iterator[ast.AST]:
        """The node and what encloses it, from the inside."""
        while True:
            yield node
            if node not in self.parents:
                return
            node = self.parents[node]

    def function_node(self, node: ast.AST, *, or_itself: bool = False) -> ast.AST | None:
        """The innermost function around a node."""
        around = self.up(node if or_itself else self.parents.get(node, self.tree))
        return next((one for one in around if isinstance(one, _FUNCTIONS)), None)

    def qualified(self, node: ast.AST) -> str:
        """`Class.method` around a node; the name that a statement of the module binds; or ""."""
        names = [one.name for one in self.up(node) if isinstance(one, (*_FUNCTIONS, ast.ClassDef))]
        if names:
            return ".".join(names[::-1])
        top = next((one for one in self.up(node) if self.parents.get(one) is self.tree), None)
        return next(iter(sorted(writes(top))), "") if top is not None else ""

    def branches(self, at: int, node: ast.AST) -> tuple[str, ...]:
        """The conditions around byte `at`, as text; "else ..." in the other branch. A test is part of its branch."""
        found = []
        for one in self.up(node):
            if isinstance(one, ast.If):
                other = one.orelse and self.span(one.orelse[0])[0] <= at
                found.append(f"{'else ' if other else ''}{ast.unparse(one.test)}")
        return tuple(found)

    def is_device(self, node: ast.AST) -> bool:
        """True in a function that Triton compiles, and in a constant for such functions."""
        for one in self.up(node):
            if isinstance(one, _FUNCTIONS) and any("jit" in ast.unparse(d) for d in one.decorator_list):
                return True
            if isinstance(one, ast.AnnAssign) and "constexpr" in ast.unparse(one.annotation):
                return self.function_node(one) is None or self.is_device(self.parents[one])
        return False

    def is_subscript_index(self, node: ast.AST) -> bool:
        """True for the tuple in x[:, None]."""
        parent = self.parents.get(node)
        return isinstance(parent, ast.Subscript) and parent.slice is node

    def bound_before(self, node: ast.AST) -> set[str]:
        """Names that are parameters of the function around a node, or that earlier statements of it bind."""
        function = self.function_node(node)
        if function is None:
            return set()
        if function not in self._names:
            arguments = function.args  # type: ignore[attr-defined]
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            bound = [(0, one.arg) for one in every]
            bound += [(n.lineno, n.id) for n in ast.walk(function) if _is_store(n)]  # type: ignore[attr-defined]
            self._names[function] = bound
        at = getattr(node, "lineno", 0)
        return {name for line, name in self._names[function] if line < at} - {"_"}

    def mutable_nodes(self) -> Iterator[ast.AST]:
        """The nodes that decide a result, in the order of the source."""
        stack: list[ast.AST] = [self.tree]
        while stack:
            node = stack.pop()
            if self._is_left_out(node):
                continue
            if node is not self.tree:
                yield node
            if not isinstance(node, ast.Raise):
                stack.extend(reversed(list(_decisive_children(node))))

    def _is_left_out(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
            return True
        named = isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or self.parents.get(node) is self.tree
        if named and sources.why_left_out(sources.stem(self.file), self.qualified(node)):
            return True
        if isinstance(node, ast.stmt) and sources.needs_two_gpus(self.line_text(node.lineno)):
            return True
        if isinstance(node, (ast.Name, ast.Attribute, ast.List)):
            text = self.text(node)
            return any(text == word or text.endswith(f".{word}") for word in sources.WORDS_LEFT_OUT)
        if isinstance(node, (ast.Call, ast.BoolOp)):
            return self.text(node).startswith(sources.CHOICES_LEFT_OUT)
        return False


def reads(statement: ast.AST) -> set[str]:
    """Names that a statement reads."""
    found = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    targets = [n.target for n in ast.walk(statement) if isinstance(n, ast.AugAssign)]
    return found | {target.id for target in targets if isinstance(target, ast.Name)}


def writes(statement: ast.AST) -> set[str]:
    """Names that a statement binds."""
    return {n.id for n in ast.walk(statement) if _is_store(n)}  # type: ignore[attr-defined]


def _is_store(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _decisive_children(node: ast.AST) -> Iterator[ast.AST]:
    """Children without annotations, defaults of types, and decorators other than Triton's."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "bases"):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, ast.AST) and (name != "decorator_list" or "jit(" in ast.unparse(one)):
                yield one
