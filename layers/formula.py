"""Whether a function computes a formula that is known here, and nothing else: by the interpreter's instructions."""

import dis
from collections.abc import Callable
from typing import Any


def is_formula(function: Callable, formula: Callable) -> bool:
    """Whether both do the same, whatever their arguments and variables are called."""
    instructions = _instructions(function)
    return instructions is not None and instructions == _instructions(formula)


def ends_like(function: Callable, ending: Callable, attribute: str) -> bool:
    """Whether both do the same with the same names, from where `ending` reads `self.attribute` to the end."""
    expected = _named_instructions(ending)
    names = [name for _, name in expected]
    expected = expected[names.index(attribute) :]
    return _named_instructions(function)[-len(expected) :] == expected


def _named_instructions(function: Callable) -> list[tuple[str, Any]]:
    return [(each.opname, each.argval) for each in dis.get_instructions(function)]


def _instructions(function: Callable) -> list[tuple[str, Any]] | None:
    """None for what is not written in Python."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    return [(each.opname, each.arg if "FAST" in each.opname else each.argval) for each in dis.get_instructions(code)]
