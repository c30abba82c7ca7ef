"""Words for a damaged document: the place, the value and the expected one, in place of pydantic's own message.

entries[0].m = 0; expected 1 or more
no entries[0].config
unknown field entries[0].host
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_SHOWN = 40  # characters of a value
_EXPECTED = {
    "greater_than_equal": "{ge} or more", "greater_than": "more than {gt}", "less_than_equal": "at most {le}",
    "less_than": "less than {lt}", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "finite_number": "a finite number", "bool_type": "true or false",
    "string_type": "a text", "tuple_type": "a list", "list_type": "a list", "dict_type": "an object",
    "model_type": "an object", "model_attributes_type": "an object", "dataclass_type": "an object",
    "dataclass_exact_type": "an object", "literal_error": "{expected}", "enum": "{expected}",
    "string_pattern_mismatch": "a text of the pattern {pattern}",
}  # fmt: skip
"""The expected value of each type of error that pydantic reports, with fields of its context."""
_SHAPE_OF_JSON = ("missing", "tuple_type", "list_type", "dict_type", "model_type", "model_attributes_type",
                  "dataclass_type", "dataclass_exact_type")  # fmt: skip


def first(error: ValidationError) -> str:
    """One line about the first error of a document; a wrong kind of value before a wrong value."""
    found = error.errors(include_url=False)
    return _line(next((one for one in found if one["type"] in _SHAPE_OF_JSON), found[0]))


def _line(one: Any) -> str:
    place = _place(one["loc"])
    if one["type"] == "missing":
        return f"no {place}"
    if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {place}"
    context = one.get("ctx", {})
    if "error" in context:  # of a validator of ours
        expected = str(context["error"])
    elif one["type"] in _EXPECTED:
        expected = f"expected {_EXPECTED[one['type']].format(**context)}"
    else:
        expected = one["msg"][:1].lower() + one["msg"][1:]
    return f"{place or 'the document'} = {_shown(one['input'])}; {expected}"


def _place(parts: tuple[int | str, ...]) -> str:
    """("entries", 0, "m") -> "entries[0].m"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
