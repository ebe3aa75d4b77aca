"""What runs in the process of one of benchmarks/step.py's variants: it is built, begins a setting, and takes turns."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.operations import Operations
from benchmarks.step_models import ParkedWeights, Setting, make_batch
from benchmarks.step_ours import ZERO3, Ours
from benchmarks.step_peers import Peer
from benchmarks.step_results import OURS
from benchmarks.step_watch import free_memory
from memory.cpu_profile import memory_events, profile_memory, rise, storage_bytes
from memory.probed_step import DEEPSPEED_UPDATES
from utils import quiet_libraries


LEARNING_RATE = 1e-3

variant: Ours | Peer | None = None
parked: ParkedWeights | None = None


def attempt(function: Callable, *arguments: Any) -> dict[str, Any]:
    """What `function` returns, and how PyTorch's GPU memory has risen and peaked. An error is `failed`."""
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.init()  # counters can be reset from then on
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved() if is_gpu else 0
    try:
        found = function(*arguments) or {}
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    except Exception as error:  # a rival's library that does not run here is a result
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    peak_bytes = torch.cuda.max_memory_reserved() if is_gpu else 0
    if "failed" in found and variant is not None:
        variant.model.zero_grad(set_to_none=True)
    leave()
    after = torch.cuda.memory_reserved() if is_gpu else 0
    return found | {"memory": {"rise_bytes": after - before, "peak_reserved_bytes": peak_bytes}}


def build(
    device: str,
    model: str,
    kind: str,
    gradient_checkpointing: bool,
    way: str,
    rows: int,
    num_tokens: int,
    parks: bool,
) -> None:
    """Build this process's variant."""
    global variant, parked
    quiet_libraries()
    settings = (device, model, gradient_checkpointing, LEARNING_RATE)
    variant = Ours(*settings, rows, num_tokens, way) if kind == OURS else Peer(kind, *settings)
    if parks:
        parked = ParkedWeights(variant.model)


def leave() -> None:
    free_memory()
    if parked is not None:
        parked.leave()


def come_back() -> None:
    if parked is not None:
        parked.come_back()


def begin(device: str, label_share: float, setting: Setting) -> dict[str, Any]:
    """The first steps and their peak in bytes, weights included."""
    num_steps = DEEPSPEED_UPDATES if setting.way == ZERO3 else 2  # from the second on the optimizer has its state
    come_back()
    num_labels = round(setting.num_tokens * label_share)
    variant.begin(setting.model, make_batch(setting.model, setting.rows, setting.num_tokens, num_labels))
    free_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return {"first_steps": variant.run(num_steps), "peak_bytes": torch.cuda.max_memory_allocated()}
    resident_bytes = storage_bytes([*variant.model.parameters(), *variant.model.buffers()])
    with profile_memory() as profiler:
        steps = variant.run(num_steps)
    return {"first_steps": steps, "peak_bytes": resident_bytes + rise(memory_events(profiler))}


def watch_steps() -> dict[str, Any]:
    """The operations of a step, and on a GPU what it did in the second of two."""
    come_back()
    with Operations() as operations:
        variant.run(1)
    found = {"hardware_flops": operations.total, "activity": None}
    if torch.cuda.is_available():
        variant.watch.profiles = True
        variant.run(2)
        variant.watch.profiles = False
        found["activity"] = asdict(variant.watch.activity)
    return found


def take_turn(num_steps: int) -> dict[str, Any]:
    """After a step that is not counted: the weights and the allocator's memory have just come back."""
    come_back()
    if torch.cuda.is_available():
        variant.run(1)
    return {"steps": variant.run(num_steps)}
