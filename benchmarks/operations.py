"""Counts the operations of what runs: matrix products, convolutions and attention, recomputed ones too."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from memory.work import counts_flops, flops_of


class Operations(TorchDispatchMode):
    """Counts as FlopCounterMode does, without its hooks on modules: those disturb a trace, and fail in tiled MLPs.

    Causal attention counts as half of the square, and PyTorch's on a CPU not at all.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **kwargs or {})
        if counts_flops(func):
            self.total += flops_of(func, args, output)
        return output
