"""Substitutes for a GPU and for other processes, for DeepSpeed to run on.

The device is `cpu:0`: PyTorch's fake tensors tell it from the host, `cpu`. The processes are PyTorch's fake process
group, whose collectives return at once. Call it in a fresh process: what install_stand_in replaces is not put back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


HOST = "cpu"
STAND_IN_DEVICE = {"cuda": "cpu:0", "cpu": "cpu"}  # a CPU run has one memory for both


def install_stand_in(device: str, world_size: int, rank: int = 0) -> Any:
    """Let torch.distributed and DeepSpeed see `world_size` processes with a device each; this one is `rank`.

    Returns the accelerator. Its `note_pinned` is called with each tensor that is pinned; its `on_stream` makes a
    context in which the stream with that number is used.
    """
    from deepspeed.accelerator import set_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stand_in = build_stand_in(device, world_size)
    set_accelerator(stand_in)
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    # Not before: DeepSpeed's modules ask for the accelerator when they are imported.
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda ints: None  # there is nobody to compare with
    return stand_in


def build_stand_in(device: str, world_size: int) -> Any:
    """The accelerator, of a class that can be defined only once DeepSpeed is imported."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class StandIn(CPU_Accelerator):
        note_pinned: Callable[[torch.Tensor], None]
        on_stream: Callable[[int], AbstractContextManager]

        def stream(self, stream: None) -> AbstractContextManager:
            # To a device without streams DeepSpeed gives None. On a GPU what runs in this context has its own stream.
            return self.on_stream(1)

        def communication_backend_name(self) -> str:
            return "gloo"  # the CPU's own name would compile an operator

        def create_op_builder(self, class_name: str) -> None:
            return None

        def device_name(self, device_index: int | None = None) -> str:
            return device

        def current_device_name(self) -> str:
            return device

        def device_count(self) -> int:
            return world_size

        def is_fp16_supported(self) -> bool:
            return True

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device == torch.device(device)

        def FloatTensor(self, values: list) -> torch.Tensor:  # noqa: N802 (DeepSpeed's name)
            return torch.tensor(values, dtype=torch.float32, device=device)

        def ByteTensor(self, values: list) -> torch.Tensor:  # noqa: N802
            return torch.tensor(values, dtype=torch.uint8, device=device)

        def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
            if device == HOST:
                return tensor
            pinned = tensor.clone()
            self.note_pinned(pinned)
            return pinned

    return StandIn()
