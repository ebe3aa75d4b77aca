"""What fills the memory, and what to change first. Every suggestion is traced, none is guessed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from memory.config import ProbeConfig
from memory.predict import predict
from memory.probed_step import num_image_positions
from memory.record import Record
from memory.report import as_flags
from models.loading import load_config, num_decoder_layers
from utils import MIB, UserError, size


def suggest(config: ProbeConfig, device_bytes: int) -> dict[str, Any]:
    """What each change of a flag would do to `device_bytes`, and the least that fits the budget.

    Returns `changes`, in the order of how much they cost (see changes_of), each with `flags`, `device_bytes`,
    `saved_bytes` and `fits`; and `nearest`, the `flags` and `device_bytes` of the first change, or else of the first
    changes together, with which it fits: None where it does so already or nothing helps.
    """
    changes = []
    for flags in changes_of(config):
        with suppress(UserError):  # not for this model: attention that caps its scores runs by eager alone
            changes.append(_traced(config, flags, device_bytes))
    nearest = None
    if device_bytes > config.budget_bytes:
        alone = next((change for change in changes if change["fits"]), None)
        nearest = {key: alone[key] for key in ("flags", "device_bytes")} if alone else _together(config, device_bytes)
    return {"changes": changes, "nearest": nearest}


def _together(config: ProbeConfig, device_bytes: int) -> dict[str, Any] | None:
    """Change after change, as long as something saves memory and it does not fit."""
    made, useless = {}, []
    while True:
        remaining = (flags for flags in changes_of(replace(config, **made)) if flags not in useless)
        flags = next(remaining, None)
        if flags is None:
            return None
        try:
            change = _traced(config, made | flags, device_bytes)
        except UserError:
            change = None
        if change is None or change["saved_bytes"] <= 0:
            useless.append(flags)
            continue
        made, device_bytes = change["flags"], change["device_bytes"]
        if change["fits"]:
            return {"flags": made, "device_bytes": device_bytes}


def _traced(config: ProbeConfig, flags: dict[str, Any], device_bytes: int) -> dict[str, Any]:
    needed_bytes = predict(replace(config, **flags))["device_bytes"]
    saved_bytes, fits = device_bytes - needed_bytes, needed_bytes <= config.budget_bytes
    return {"flags": flags, "device_bytes": needed_bytes, "saved_bytes": saved_bytes, "fits": fits}


def explain(config: ProbeConfig, record: Record, suggestions: dict[str, Any]) -> list[str]:
    """Lines for a reader: the logits of the device's record, then each change with what it saves, most first."""
    vocab_size = load_config(config.model).get_text_config().vocab_size
    logits = logits_lines(record, config.max_seq_len, vocab_size)
    lines = [*(["The logits:", *logits] if logits else []), "What to change first:"]
    for change in sorted(suggestions["changes"], key=lambda change: -change["saved_bytes"]):
        if change["saved_bytes"] > 0:
            lines.append(f"  {size(change['saved_bytes']):>12} less with {as_flags(change['flags'])}")
    if (nearest := suggestions["nearest"]) is not None:
        lines.append(f"Nearest that fits: {as_flags(nearest['flags'])} ({size(nearest['device_bytes'])})")
    return lines


def logits_lines(record: Record, length: int, vocab_size: int) -> list[str]:
    """Every kind of tensor with a number for each vocabulary entry: its size, and how many live at the peak."""
    at_peak = Counter()
    sizes: dict[tuple[str, int], None] = {}  # in order of appearance
    for nbytes, allocation in record.events:
        shape = allocation.shape
        # A loss may leave out each row's last position.
        if nbytes > 0 and shape[-1:] == (vocab_size,) and {length, length - 1} & {shape[0], *shape[1:-1]}:
            sizes[allocation.dtype, nbytes] = None
    for allocation in record.alive_at(record.peak_index):
        at_peak[allocation.dtype, allocation.nbytes] += (allocation.dtype, allocation.nbytes) in sizes
    return [
        f"  {nbytes / MIB:.2f} MiB in {dtype}, {at_peak[dtype, nbytes]} of them alive at the peak"
        for dtype, nbytes in sizes
    ]


def changes_of(config: ProbeConfig) -> Iterator[dict[str, Any]]:
    """The flags that could be changed, one thing at a time: first what leaves every update as it is and costs time
    alone, then what trains less, last what cuts samples."""
    if config.eval_samples and config.per_device_eval_batch_size > 1:
        yield {"per_device_eval_batch_size": 1}
    if config.loss == "full":
        yield {"loss": "chunked"}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.checkpoint_num_layers is not None:
        num_layers = num_decoder_layers(config.model)
        if config.checkpoint_num_layers < num_layers:
            yield {"checkpoint_num_layers": num_layers, "checkpoint_num_mlps": 0}
    if config.attn_implementation == "eager":
        yield {"attn_implementation": "sdpa"}
    if config.per_device_train_batch_size > 1:
        rows = config.per_device_train_batch_size // 2
        yield {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * 2,
        }
    is_quantized_dora = config.use_dora and config.quantize != "none"  # not under ZeRO
    if (config.strategy, config.offload) != ("zero3", "param") and not is_quantized_dora:
        yield {"strategy": "zero3", "offload": "param", "config_file": None}
    if config.lora_r == 0:
        yield {"lora_r": 16}
        if config.optim != "sgd":
            yield {"optim": "sgd"}
    elif config.quantize == "none" and not config.use_dora:
        yield {"quantize": "nf4"}
    image_positions = num_image_positions(config)
    width, height = config.photo_size
    half_as_wide = {"max_image_pixels": (config.max_image_pixels or width * height) // 4}
    if num_image_positions(replace(config, **half_as_wide)) < image_positions:
        yield half_as_wide
    if config.max_seq_len // 2 > image_positions:
        yield {"max_seq_len": config.max_seq_len // 2}
