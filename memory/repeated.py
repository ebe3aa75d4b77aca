"""What operators on fake tensors returned when they ran on the like before.

A step repeats its layers, and FakeTensorMode's own cache takes several times as long.

Only operators that return one tensor are remembered: a new one, a view of their first argument, or that argument.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """How a tensor that was returned lies in memory; `kind`: new | view | first."""

    kind: str
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class RepeatedOps:
    """The forms of what operators have returned, by operator and arguments."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.forms: dict[Key, Form] = {}

    def key_of(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Key | None:
        """None for what cannot be told by the form of its arguments."""
        parts: list[Any] = [func, *kwargs]
        return tuple(parts) if _describe((*args, *kwargs.values()), parts) else None

    def repeat(self, key: Key, args: tuple) -> FakeTensor | None:
        """What the operator returns, if it has run on the like."""
        form = self.forms.get(key)
        if form is None:
            return None
        if form.kind == "first":
            return args[0]
        # On `meta` and outside of any mode: this runs inside a mode's dispatch.
        if form.kind == "new":
            made = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
        else:
            made = torch.empty(0, dtype=form.dtype, device="meta")
            made.set_(args[0].untyped_storage(), form.offset, form.shape, form.stride)
        return FakeTensor(self.fake_mode, made, form.device)

    def remember(self, key: Key, func: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, FakeTensor) and output.constant is None:
            form = _form_of(func, args, kwargs, output)
            # What changes the form of its argument has another key now.
            if form is not None and self.key_of(func, args, kwargs) == key:
                self.forms[key] = form


def _describe(values: Iterable[Any], parts: list[Any]) -> bool:
    """Add to `parts` what is to know of the values; False: that is not enough."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None or value.dtype.is_complex:
                return False
            parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _describe(value, parts):
                return False
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout)):
            parts.append((type(value), value))
        elif isinstance(value, torch.memory_format):
            parts.append(value)
        else:
            return False
    return True


def _form_of(func: Any, args: tuple, kwargs: dict[str, Any], output: FakeTensor) -> Form | None:
    """None: it returned something else than a new tensor, a view of its first argument, or that argument."""
    first = args[0] if args else None
    if output is first:
        return None if torch.Tag.inplace_view in func.tags else Form("first")
    storage = output.untyped_storage()
    where = (tuple(output.shape), output.stride(), output.storage_offset(), output.dtype, output.fake_device)
    if isinstance(first, FakeTensor) and storage._cdata == first.untyped_storage()._cdata:
        return Form("view", *where)
    others = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    is_new = not func._schema.is_mutable and all(storage._cdata != x.untyped_storage()._cdata for x in others)
    like_it = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device="meta")
    is_plain = output.storage_offset() == 0 and storage.nbytes() == like_it.untyped_storage().nbytes()
    return Form("new", *where) if is_new and is_plain else None
