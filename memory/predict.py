"""Predict a configuration's memory: trace the step, replay the allocator, add what a process needs besides."""

import re
from typing import Any

from memory.allocator import replay_events
from memory.cards import GPUS, overhead_bytes
from memory.config import ProbeConfig
from memory.ddp import with_ddp
from memory.fsdp2 import trace_fsdp2
from memory.host import host_breakdown
from memory.notes import allocator_note, card_notes, offload_note
from memory.placed import PlacedRecord
from memory.record import Record, TraceError
from memory.step_time import time_of
from memory.strategy import Strategy
from memory.trace import trace_single
from memory.zero import trace_deepspeed
from models.family import is_mgm
from models.loading import load_config
from utils import UserError, allocator_settings, brief_error


PEFT_NAMES = re.compile(r"^base_model\.model\.?|modules_to_save\.default\.|\.base_layer")  # PEFT adds these to paths


def predict(config: ProbeConfig) -> dict[str, Any]:
    """The peak in bytes, what is in it, and what device and host need.

    Raises:
        UserError: there is no such strategy, the images do not fit into a row, or the step does what cannot be traced.
    """
    return summarize(trace_step(config), config)


def trace_step(config: ProbeConfig, rank: int = 0) -> PlacedRecord:
    """The step under the strategy that the flags choose. Raises UserError as predict does."""
    try:
        return trace_strategy(config, config.launch, rank)
    except TraceError as error:
        raise UserError(f"--model {config.model}: {error}") from None
    except ImportError as error:  # a kernel's package; sdpa takes the same FlashAttention on a GPU, and as much memory
        raise UserError(
            f"--attn_implementation {config.attn_implementation}: {brief_error(error).rstrip('.')}; choose sdpa"
        ) from None
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        is_refused = isinstance(error, ValueError)  # DeepSpeed's word for a config
        if is_mgm(load_config(config.model)) and not is_refused:
            raise  # the model is ours, and so is the mistake: it keeps its traceback
        raise UserError(
            f"--model {config.model}: its training step cannot be traced ({brief_error(error)})"
        ) from error


def trace_strategy(config: ProbeConfig, strategy: Strategy, rank: int = 0) -> PlacedRecord:
    """Trace the steps of one of the strategy's processes. Raises what the functions raise that it calls."""
    if strategy.name.startswith("zero"):
        return trace_deepspeed(config, strategy, rank)
    # accelerate wraps the model on GPUs even for one process, on a CPU for several.
    is_wrapped = strategy.world_size > 1 or config.device == "cuda"
    if strategy.name == "fsdp2" and is_wrapped:
        return trace_fsdp2(config, strategy, rank)
    record = trace_single(config)
    if strategy.name == "ddp" and is_wrapped:
        record = with_ddp(record, strategy.world_size, on_gpu=config.device == "cuda")
    return PlacedRecord(device=record, pinned=Record(), host=Record())


def summarize(record: PlacedRecord, config: ProbeConfig) -> dict[str, Any]:
    """What is reported of a traced step."""
    host = host_breakdown(record, config.dataloader_num_workers, config.world_size, config.device)
    totals = device_memory(record.device, config) | {"host_bytes": sum(host.values())}
    result = describe(record.device) | totals | time_of(record.device, config)
    notes = list(record.device.notes)
    if config.device == "cuda":
        notes += offload_note(config) + allocator_note(config)
        notes += card_notes(GPUS[config.gpu], totals["device_bytes"], totals["host_bytes"])
    return result | {"notes": notes}


def last_rank(first: PlacedRecord, config: ProbeConfig) -> dict[str, int]:
    """The memory of the last process. DDP gives all processes the same. What is split need not be divided evenly."""
    record = first if config.strategy == "ddp" else trace_step(config, config.world_size - 1)
    return {"peak_allocated_bytes": record.device.peak_bytes} | device_memory(record.device, config)


def describe(record: Record) -> dict[str, Any]:
    """What is alive at the peak."""
    return {
        "peak_allocated_bytes": record.peak_bytes,
        "breakdown": record.breakdown(),
        "phases": record.phase_peaks(),
        "largest_tensors": [
            {
                "bytes": tensor.nbytes,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "category": tensor.category,
                "module": PEFT_NAMES.sub("", tensor.module),
                "op": tensor.op,
            }
            for tensor in record.largest_at_peak()
        ],
    }


def device_memory(record: Record, config: ProbeConfig) -> dict[str, int]:
    """What the allocator reserves of the device, and what nvidia-smi would show: that must fit."""
    if config.device == "cpu":  # no pool, no context
        return {"peak_reserved_bytes": record.peak_bytes, "device_bytes": record.peak_bytes}
    events = ((nbytes, id(allocation), allocation.stream) for nbytes, allocation in record.events)
    replay = replay_events(
        events, expandable_segments=has_expandable_segments(), release_before=cache_releases(record)
    )
    return {
        "peak_reserved_bytes": replay.peak_reserved_bytes,
        "device_bytes": replay.peak_reserved_bytes + overhead_bytes(config.gpu, config.strategy, config.world_size),
    }


def has_expandable_segments() -> bool:
    return "expandable_segments:True" in allocator_settings()


def cache_releases(record: Record) -> tuple[int, ...]:
    """The events before which train.py gives the cache back: what loading has left before the first step, and what
    training has left before it evaluates."""
    first_step = next(index for index, phase in record.phase_starts if phase == "forward")
    evaluation = [index for index, phase in record.phase_starts if phase == "evaluate"]
    return (first_step, *evaluation)
