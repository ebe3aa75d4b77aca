"""What fills the memory and what to change first: every suggestion is traced, none is guessed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from memory_gpus import MIB
from memory_predict import predict, trace_step
from memory_report import size
from memory_strategies import strategy_of
from memory_trace import Trace
from train import StepConfig
from utils import load_config


def explain(config: StepConfig, device_bytes: int) -> list[str]:
    """Lines for a reader: the logits, then each change with what it saves of `device_bytes`, most first."""
    trace = trace_step(config, strategy_of(config)).device
    vocab_size = load_config(config.model).text_config.vocab_size
    lines = ["The logits:", *logits_lines(trace, config.max_seq_len, vocab_size), "What to change first:"]
    suggestions = []
    for changes in changes_of(config):
        saved_bytes = device_bytes - predict(replace(config, **changes))["device_bytes"]
        suggestions.append((saved_bytes, as_flags(changes)))
    for saved_bytes, flags in sorted(suggestions, reverse=True):
        if saved_bytes > 0:
            lines.append(f"  {size(saved_bytes):>12} less with {flags}")
    return lines


def logits_lines(trace: Trace, length: int, vocab_size: int) -> list[str]:
    """Every kind of tensor with a number for each word of the vocabulary: its size, and how many live at the peak."""
    at_peak = Counter()
    sizes: dict[tuple[str, int], None] = {}  # in order of appearance
    for nbytes, allocation in trace.record.events:
        shape = allocation.shape
        # The loss leaves out each row's last position, or does not.
        if nbytes > 0 and shape[-1:] == (vocab_size,) and {length, length - 1} & {shape[0], *shape[1:-1]}:
            sizes[allocation.dtype, nbytes] = None
    for allocation in trace.alive_at(trace.peak_index):
        at_peak[allocation.dtype, allocation.nbytes] += (allocation.dtype, allocation.nbytes) in sizes
    return [
        f"  {nbytes / MIB:.2f} MiB in {dtype}, {at_peak[dtype, nbytes]} of them alive at the peak"
        for dtype, nbytes in sizes
    ]


def changes_of(config: StepConfig) -> Iterator[dict[str, Any]]:
    """The flags that could be changed, one thing at a time."""
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.per_device_train_batch_size > 1:
        rows = config.per_device_train_batch_size // 2
        yield {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * 2,
        }
    image_positions = config.images_per_sample * load_config(config.model).num_image_tokens
    if config.max_seq_len // 2 > image_positions:
        yield {"max_seq_len": config.max_seq_len // 2}
    if config.lora_r == 0:
        yield {"lora_r": 16}
        if config.optim != "sgd":
            yield {"optim": "sgd"}
    elif config.quantize == "none" and not (config.use_dora and config.strategy.startswith("zero")):
        yield {"quantize": "nf4"}
    if config.attn_implementation == "eager":
        yield {"attn_implementation": "sdpa"}
    if config.strategy == "single" and not (config.use_dora and config.quantize != "none"):
        yield {"strategy": "zero3", "offload": "param"}


def as_flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in changes.items())
