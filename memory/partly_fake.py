"""Weights are fake, the batch is real: `with PartlyFakeMode(): model(**batch)`.

A model's control flow asks token ids, grids, masks and image sizes for their values: `.tolist()`, `nonzero`, boolean
masks, checks of counts. All of them come from the batch, none from a weight. So the batch stays real, and so does what
is computed from it alone; a weight, and what is computed from a weight, is fake: it has a shape and a lifetime, but no
data. transformers then sees real masks and positions, and takes the branch that a run takes.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch._meta_registrations import _create_grouped_mm_output_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from memory.repeated import RepeatedOps


aten = torch.ops.aten
# Factories whose values may be read later: they run.
MAKE_VALUES = (
    aten.arange, aten.linspace, aten.logspace, aten.scalar_tensor, aten.eye, aten.tril_indices, aten.triu_indices,
)  # fmt: skip
# Factories that make room for something. Integers and flags run, since a model makes positions and masks of them; what
# is written into floats comes from weights, so that these are fake. So are bytes, which hold packed 4-bit weights.
MAKE_ROOM = (aten.empty, aten.empty_strided, aten.zeros, aten.ones, aten.full)
PACKED = torch.uint8
LARGE = 2**25  # values
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default)


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class PartlyFakeMode(FakeTensorMode):
    """Runs for real what has no fake argument; makes up the rest, as FakeTensorMode does.

    A real tensor into which something fake is written counts as fake from then on: its values are stale.

    Args:
        device: where the model's fake tensors are. Real ones lie on the CPU whatever it is, and count as being there.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(device)
        self.in_model: Callable[[], bool] = lambda: False  # whether a module's forward runs; a recorder knows
        self._makes_up = False  # while an operator's result is made up, whatever it makes on its way is fake
        self._repeated = RepeatedOps(self)
        self._stale: set[int] = set()  # addresses of the storages of such real tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its operators on the local parts come here, too
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        if not any(map(self.is_fake, tensors)):
            if func is aten._to_copy.default and self._is_there(args[0], kwargs):
                return args[0]
            if tensors and grows_large(func, tensors):
                return self._make_up(func, types, *self._moved(args, kwargs))
            if tensors or self._makes_values(func, args, kwargs):
                return func(*args, **kwargs)
            if self.in_model() and kwargs.get("device") == torch.device("cpu"):
                # The model asks for it beside the batch, which is on its device.
                kwargs = kwargs | {"device": self.device}
            return self._make_up(func, types, args, kwargs)
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            with self:  # the kernels take other dtypes too, only the meta kernel refuses them
                return _create_grouped_mm_output_tensor(*args[:2], args[2], None)
        if func in INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        if all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._run_or_repeat(func, types, args, kwargs)
        written = self._real_written(func, args)
        output = self._make_up(func, types, *self._on_one_device(tensors, args, kwargs))
        return output if written is None else written

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to tell Dynamo so at each operator takes time

    def _make_up(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """What FakeTensorMode returns."""
        before, self._makes_up = self._makes_up, True
        try:
            return self.dispatch(func, types, args, kwargs)
        finally:
            self._makes_up = before

    def _run_or_repeat(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        key = self._repeated.key_of(func, args, kwargs)
        if key is None:
            return self._make_up(func, types, args, kwargs)
        output = self._repeated.repeat(key, args)
        if output is None:
            output = self._make_up(func, types, args, kwargs)
            self._repeated.remember(key, func, args, kwargs, output)
        return output

    def is_fake(self, tensor: torch.Tensor) -> bool:
        """Whether its values are unknown."""
        if isinstance(tensor, FakeTensor):
            return True
        return bool(self._stale) and tensor.untyped_storage()._cdata in self._stale

    def _is_there(self, tensor: torch.Tensor, kwargs: dict) -> bool:
        """Whether a real tensor is only sent to the model's device, where it counts as being."""
        is_sent = self.device.index is not None and kwargs.get("device") == self.device
        return is_sent and kwargs.get("dtype") in (None, tensor.dtype) and kwargs.get("memory_format") is None

    def _makes_values(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if self._makes_up:
            return False
        if func.overloadpacket in MAKE_VALUES:
            return True
        if func.overloadpacket not in MAKE_ROOM:
            return False
        dtype = kwargs.get("dtype")
        if dtype is None:
            return func.overloadpacket is aten.full and isinstance(args[1], int)
        return not (dtype.is_floating_point or dtype.is_complex or dtype == PACKED)

    def _real_written(self, func: Any, args: tuple) -> torch.Tensor | None:
        """The real tensor that an operator writes something fake into, noted as stale."""
        found = None
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                found = value
                self._note_stale(value.untyped_storage())
        return found

    def _note_stale(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._stale:
            self._stale.add(address)
            weakref.finalize(storage, self._stale.discard, address)

    def _on_one_device(self, tensors: list[torch.Tensor], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, with fake ones on the model's device for what is real, if the model's are there."""
        is_apart = self.device.index is not None  # else device and host are one, and their tensors mix
        if not is_apart or not any(isinstance(x, FakeTensor) and x.device == self.device for x in tensors):
            return args, kwargs
        return self._moved(args, kwargs)

    def _moved(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, with fake ones on the model's device for what is real."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            with self:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

        with patch.object(self, "_makes_up", True):  # integers too
            return tree_map_only(torch.Tensor, moved, (args, kwargs))


def grows_large(func: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether an operator makes something large of small tensors: a mask of all pairs of positions, as a rule. Nobody
    asks for its values, and for a long row it would fill this machine's memory."""
    if len(tensors) < 2 or torch.Tag.pointwise not in func.tags:
        return False
    num_values = math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    return num_values > LARGE and num_values > max(tensor.numel() for tensor in tensors)


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The positions that real boolean masks select, in their place: a fake tensor's kernel would look for them."""
    found = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found
