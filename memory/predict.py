"""A configuration's predicted memory: the traced step, the allocator's replay of it, what a process takes besides."""

import copy
import re
from collections.abc import Hashable, Iterator
from typing import Any

from memory.allocator import replay_events
from memory.config import strategy_of
from memory.ddp import with_ddp_buckets
from memory.gpus import GPUS, NCCL_BYTES
from memory.host import host_breakdown
from memory.placed import PlacedTrace
from memory.record import Record, TraceError
from memory.strategy import Strategy
from memory.trace import Trace, trace_training
from memory.zero import trace_deepspeed
from mgm.configuration_mgm import MGMConfig
from models.loading import load_config
from step import StepConfig
from utils import UserError, allocator_settings, brief_error


PEFT_NAMES = re.compile(r"^base_model\.model\.?|modules_to_save\.default\.|\.base_layer")  # what PEFT adds to paths


def predict(config: StepConfig) -> dict[str, Any]:
    """A ProbeConfig's peak in bytes, what is in it, and what device and host have to have.

    Raises:
        UserError: there is no such strategy, the images do not fit into a row, or the step does what cannot be traced.
    """
    return summarize(trace_step(config), config)


def trace_step(config: StepConfig) -> PlacedTrace:
    """The step that a ProbeConfig's flags choose. Raises UserError as predict does."""
    strategy = strategy_of(config)
    workspace_bytes = GPUS[config.gpu].family.cublas_workspace_bytes if config.device == "cuda" else 0
    try:
        return trace_strategy(config, strategy, config.device, config.images_per_sample, workspace_bytes)
    except TraceError as error:
        raise UserError(f"--model {config.model}: {error}") from None
    except ImportError as error:  # a kernel's package; sdpa takes the same FlashAttention on a GPU, and as much memory
        raise UserError(
            f"--attn_implementation {config.attn_implementation}: {brief_error(error).rstrip(chr(46))}; choose sdpa"
        ) from None
    except ValueError as error:
        raise UserError(f"--images_per_sample {config.images_per_sample}: {error}") from None
    except (AttributeError, TypeError, RuntimeError) as error:
        if load_config(config.model).model_type == MGMConfig.model_type:
            raise  # a mistake of ours: it keeps its traceback
        raise UserError(
            f"--model {config.model}: its training step cannot be traced ({brief_error(error)})"
        ) from error


def trace_strategy(config: StepConfig, strategy: Strategy, *settings: Any) -> PlacedTrace:
    """Trace the steps of one of the strategy's processes.

    `settings` are those of trace_training: device_type, images_per_sample and cublas_workspace_bytes. Raises what
    trace_training and trace_deepspeed raise.
    """
    if strategy.name.startswith("zero"):
        # DeepSpeed's own Adam has the same states as torch's, but has to be compiled.
        deepspeed_config = copy.deepcopy(strategy.deepspeed_config) | {"zero_force_ds_cpu_optimizer": False}
        return trace_deepspeed(config, deepspeed_config, strategy.world_size, *settings)
    trace = trace_training(config, *settings)
    # accelerate wraps the model on GPUs even for one process, on a CPU for several.
    if strategy.name == "ddp" and (strategy.world_size > 1 or settings[:1] != ("cpu",)):
        trace = Trace(with_ddp_buckets(trace.record))
    return PlacedTrace(device=trace, pinned=Trace(Record()), host=Trace(Record()))


def summarize(trace: PlacedTrace, config: StepConfig) -> dict[str, Any]:
    """What is reported of a ProbeConfig's traced step."""
    host = host_breakdown(trace, config.dataloader_num_workers, config.world_size, config.device)
    return describe(trace.device) | device_memory(trace, config) | {"host_bytes": sum(host.values())}


def describe(trace: Trace) -> dict[str, Any]:
    """What is alive at the peak."""
    largest = [{"bytes": tensor.pop("nbytes")} | tensor for tensor in trace.largest_tensors()]
    for tensor in largest:
        tensor |= {"module": PEFT_NAMES.sub("", tensor["module"]), "shape": list(tensor["shape"])}
    return {
        "peak_allocated_bytes": trace.peak_bytes,
        "breakdown": trace.breakdown(),
        "phases": trace.phase_peaks(),
        "largest_tensors": largest,
    }


def device_memory(trace: PlacedTrace, config: StepConfig) -> dict[str, int]:
    """What the allocator reserves, and what nvidia-smi would show: that has to fit."""
    if config.device == "cpu":  # no pool, no context
        return {"peak_reserved_bytes": trace.device.peak_bytes, "device_bytes": trace.device.peak_bytes}
    is_expandable = "expandable_segments:True" in allocator_settings()
    # train.py gives back what loading has left before the first step, and what training has left before it evaluates.
    phase_starts = trace.device.record.phase_starts
    first_step = next(index for index, phase in phase_starts if phase == "forward")
    evaluation = [index for index, phase in phase_starts if phase == "evaluate"]
    replay = replay_events(
        step_events(trace.device), expandable_segments=is_expandable, release_before=(first_step, *evaluation)
    )
    family = GPUS[config.gpu].family
    overhead_bytes = family.context_bytes + family.kernels_bytes + (NCCL_BYTES if config.strategy != "single" else 0)
    return {
        "peak_reserved_bytes": replay.peak_reserved_bytes,
        "device_bytes": replay.peak_reserved_bytes + overhead_bytes,
    }


def step_events(trace: Trace) -> Iterator[tuple[int, Hashable, int]]:
    return ((nbytes, id(allocation), allocation.stream) for nbytes, allocation in trace.record.events)
