"""The rules that make faults: each finds places in a source file, and a replacement for each.

    constant      n becomes n + 1 or n - 1; a fraction becomes its neighbour in fp32
    comparison    < becomes <= or >=, == becomes !=
    arithmetic    + becomes -, // becomes * or %; a sign is dropped
    removal       a statement becomes `pass`
    mask          the mask of a load or a store, a predicate or an operand of `and`, `or`, `&`, `|` is dropped
    exchange      two arguments, or a name and another of its kind, such as stride_xm and stride_om
    cast          x.to(dtype) becomes x
    order         two adjacent statements change places
    keyword       a keyword argument is dropped, or True becomes False
    condition     a condition becomes True or False

A replacement is exact: byte offsets of the file and new text. Positions come from the syntax tree. Writing the whole
tree with `ast.unparse` was rejected: comments and layout would be lost, and a difference could not be read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from int8kit.verify.mutation import sources
from int8kit.verify.mutation.parsed import Parsed, reads, writes


class Edit(NamedTuple):
    """One replacement: bytes `start` to `end` of the file become `new`."""

    start: int
    end: int
    new: str


Rule = Callable[[Parsed, ast.AST], Iterator[Edit]]

_COMPARISONS = {
    ast.Lt: ("<", ("<=", ">=")), ast.LtE: ("<=", ("<", ">")), ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")), ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)), ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)), ast.NotIn: ("not in", ("in",)),
}  # fmt: skip
_OPERATORS = {
    ast.Add: ("+", ("-",)), ast.Sub: ("-", ("+",)), ast.Mult: ("*", ("+",)), ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("*", "%")), ast.Mod: ("%", ("//",)), ast.Pow: ("**", ("*",)),
    ast.LShift: ("<<", (">>",)), ast.RShift: (">>", ("<<",)), ast.BitAnd: ("&", ("|",)), ast.BitOr: ("|", ("&",)),
    ast.BitXor: ("^", ("&",)),
}  # fmt: skip
_COLLECTIONS = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.JoinedStr)
_COMMUTATIVE = {"min", "max", "minimum", "maximum", "isinstance", "getattr", "zip", "print"}
_CASTS = {"to", "contiguous", "float"}
_CASTING_CALLS = {"widen", "widen_row", "round_to", "int", "float"}
_KINDS = (
    {"M", "N", "K"}, {"m", "n", "k"}, {"row", "col"}, {"rows", "cols"}, {"sx", "sw"}, {"xq", "wq"}, {"x", "w"},
    {"a", "b"}, {"lo", "hi"}, {"k0", "k1"}, {"first", "last"}, {"q", "s"}, {"g", "u"}, {"gate", "up"},
    {"block_m", "block_n", "block_k"}, {"BLOCK_M", "BLOCK_N", "BLOCK_K"}, {"full", "empty"}, {"cos", "sin"},
    {"weight", "modulation"}, {"residual", "branch"}, {"i", "j"}, {"e", "f"}, {"tiles", "workers"},
    {"workspace", "arrived"}, {"total", "steps"}, {"segments", "waves"},
)  # fmt: skip


def constant(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Numbers; not True and False."""
    value = getattr(node, "value", None)
    if not isinstance(node, ast.Constant) or isinstance(value, bool):
        return
    if isinstance(value, int):
        form = hex if p.text(node).lower().startswith("0x") else str
        new = [form(value + 1), form(value - 1)] if value else ["1"]
    elif isinstance(value, float):
        neighbour = float(np.nextafter(np.float32(value), np.float32(np.inf)))
        new = [repr(value + 1.0 if value.is_integer() else neighbour)]
    else:
        return
    for text in new:
        yield Edit(*p.span(node), text)


def comparison(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Each operator of a comparison."""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            old, news = _COMPARISONS[type(op)]
            yield from _operator(p, left, right, old, news)


def arithmetic(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Binary operators, augmented assignments and signs. Joined tuples, texts and dictionaries are left alone."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        old, news = _OPERATORS[type(node.op)]
        sides = node.left, node.right
        joined = any(isinstance(side, _COLLECTIONS) or isinstance(getattr(side, "value", 0), str) for side in sides)
        if not joined and (p.is_device(node) or not isinstance(node.op, (ast.BitOr, ast.BitAnd))):
            yield from _operator(p, node.left, node.right, old, news)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        old, news = _OPERATORS[type(node.op)]
        if not isinstance(node.value, _COLLECTIONS):
            yield from _operator(p, node.target, node.value, f"{old}=", [f"{new}=" for new in news])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield Edit(*p.span(node), p.text(node.operand))


def removal(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Statements whose names stay bound without them."""
    if isinstance(node, ast.Expr):
        removable = isinstance(node.value, ast.Call)
    elif isinstance(node, ast.Assign):
        removable = writes(node) <= p.bound_before(node)
    else:
        removable = isinstance(node, (ast.AugAssign, ast.Raise)) or (isinstance(node, ast.If) and not node.orelse)
    if removable and p.function_node(node) is not None:
        yield Edit(*p.span(node), "pass")


def mask(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Masks with their `other`, predicates, and operands of logical operators."""
    if isinstance(node, ast.Call):
        named = [keyword for keyword in node.keywords if keyword.arg in ("mask", "other")]
        if any(keyword.arg == "mask" for keyword in named):
            yield from _dropped(p, node, named)
        yield from (e for keyword in node.keywords if keyword.arg == "pred" for e in _dropped(p, node, [keyword]))
    elif isinstance(node, ast.BoolOp):
        word = " and " if isinstance(node.op, ast.And) else " or "
        for i in range(len(node.values)):
            kept = [p.text_in_parentheses(value) for j, value in enumerate(node.values) if j != i]
            yield Edit(*p.span(node), word.join(kept))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)) and p.is_device(node):
        yield Edit(*p.span(node), p.text_in_parentheses(node.left))
        yield Edit(*p.span(node), p.text_in_parentheses(node.right))


def exchange(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Adjacent arguments and elements of tuples; names and attributes of one kind."""
    if isinstance(node, ast.Call):
        name = _called(node)
        if name not in _COMMUTATIVE:
            yield from _swapped(p, node.args[1:] if name == "fma" else node.args)
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
        # the exceptions that an `except` names have no order
        names = isinstance(next(p.up(node), None), ast.ExceptHandler)
        if p.function_node(node) is not None and not p.is_subscript_index(node) and not names:
            yield from _swapped(p, node.elts)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        bound = p.bound_before(node)
        for other in sorted(bound):
            if _of_one_kind(node.id, other):
                yield Edit(*p.span(node), other)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        end = p.span(node)[1]
        for other in sorted({name for kind in _KINDS if node.attr in kind for name in kind} - {node.attr}):
            if other in p.attributes:
                yield Edit(end - len(node.attr.encode()), end, other)


def cast(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Conversions, by a method or by a function."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _CASTS:
            yield Edit(*p.span(node), p.text_in_parentheses(node.func.value))
        elif _called(node) in _CASTING_CALLS and node.args:
            yield Edit(*p.span(node), p.text_in_parentheses(node.args[0]))


def order(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Adjacent simple statements where both act, or where one reads or writes a bound name that the other writes."""
    for block in ("body", "orelse"):
        statements = getattr(node, block, None)
        if not isinstance(statements, list) or p.function_node(node, or_itself=True) is None:
            continue
        for one, two in pairwise(statements):
            simple = all(isinstance(s, (ast.Expr, ast.Assign, ast.AugAssign, ast.If, ast.For)) for s in (one, two))
            if not simple or isinstance(getattr(one, "value", None), ast.Constant):
                continue
            known = p.bound_before(one)
            new = writes(one) - known
            depends = writes(one) & (reads(two) | writes(two)) or writes(two) & reads(one)
            # in host code, two calls that share no name are checks: their order selects a message alone
            acting = p.is_device(one) and _acts(one) and _acts(two) and not (_is_store(one) and _is_store(two))
            if not new & reads(two) and (depends or acting):
                (start, middle), (after, end) = p.span(one), p.span(two)
                yield Edit(start, end, p.text(two) + p.between(middle, after) + p.text(one))


def keyword(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Keyword arguments."""
    if isinstance(node, ast.Call):
        for one in node.keywords:
            if one.arg is None or one.arg in sources.KEYWORDS_LEFT_OUT | {"mask", "other", "pred"}:
                continue
            yield from _dropped(p, node, [one])
            if isinstance(one.value, ast.Constant) and isinstance(one.value.value, bool):
                yield Edit(*p.span(one.value), str(not one.value.value))


def condition(p: Parsed, node: ast.AST) -> Iterator[Edit]:
    """Tests of statements, expressions and comprehensions."""
    tests = []
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    for test in tests:
        yield Edit(*p.span(test), "True")
        yield Edit(*p.span(test), "False")


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (constant, comparison, arithmetic, removal, mask, exchange, cast, order, keyword, condition)
}
"""Every rule by its name."""


def _operator(p: Parsed, left: ast.AST, right: ast.AST, old: str, news: tuple[str, ...] | list[str]) -> Iterator[Edit]:
    """Replacements of the operator between two operands."""
    start, end = p.span(left)[1], p.span(right)[0]
    pattern = re.escape(old).replace(r"\ ", r"\s+")
    if old[-1].isalpha():
        pattern = rf"\b{pattern}\b"
    if found := re.search(pattern, p.between(start, end)):
        for new in news:
            yield Edit(start + found.start(), start + found.end(), new)


def _dropped(p: Parsed, call: ast.Call, keywords: list[ast.keyword]) -> Iterator[Edit]:
    """The call without these neighbouring keyword arguments."""
    every: list[ast.AST] = sorted([*call.args, *call.keywords], key=lambda a: p.span(a)[0])
    first, last = every.index(keywords[0]), every.index(keywords[-1])
    if last - first + 1 != len(keywords):
        return
    end = p.span(every[last])[1]
    if first:
        yield Edit(p.span(every[first - 1])[1] + p.closing(p.span(every[first - 1])[1]), end, "")
    elif last + 1 < len(every):
        yield Edit(p.span(every[0])[0], p.span(every[last + 1])[0], "")
    else:
        yield Edit(p.span(every[0])[0], end, "")


def _swapped(p: Parsed, items: list[ast.expr]) -> Iterator[Edit]:
    for one, two in pairwise(items):
        if isinstance(one, ast.Starred) or isinstance(two, ast.Starred) or p.text(one) == p.text(two):
            continue
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            continue
        (start, middle), (after, end) = p.span(one), p.span(two)
        yield Edit(start, end, p.text(two) + p.between(middle, after) + p.text(one))


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _of_one_kind(name: str, other: str) -> bool:
    """Names of a listed kind, and names that differ in one part: cos_ptr and sin_ptr, x_0 and x_1."""
    if name == other:
        return False
    if any(name in kind and other in kind for kind in _KINDS):
        return True
    a, b = name.split("_"), other.split("_")
    return len(a) == len(b) > 1 and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def _is_store(statement: ast.stmt) -> bool:
    """True for a store, or an `if` around stores: two of them in a row write different elements."""
    if isinstance(statement, ast.If):
        return not statement.orelse and all(map(_is_store, statement.body))
    return re.match(r"(tl\.store|store_\w+|\w+_buffer\.store)\(", ast.unparse(statement)) is not None


def _acts(statement: ast.stmt) -> bool:
    """True if the statement is a call for its effect, or holds one."""
    return any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) for node in ast.walk(statement))
