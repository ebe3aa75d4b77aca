"""What people read: the verdict and a table for one configuration, Markdown for many."""

import shlex
from typing import Any

from memory.cards import GPUS
from memory.categories import TITLES
from utils import MIB, counted, flag_words, markdown_table, size


BAR_WIDTH = 24  # characters


def report(result: dict) -> str:
    """A few lines: what fills the memory, and whether it fits."""
    lines = [title(result), ""]
    if result.get("breakdown"):
        lines += [*breakdown_lines(result), ""]
    lines += [*total_lines(result), *phase_lines(result), *time_lines(result)]
    lines += [f"  note: {note}" for note in result.get("notes", [])]
    lines += ["", verdict(result)]
    if result.get("oom"):
        lines.append(result["oom"])
    if "error" in result:
        lines.append(
            f"predicted {size(result['predicted_peak_allocated_bytes'])}, "
            f"measured {size(result['measured_peak_allocated_bytes'])}: {result['error']:+.2%}"
        )
    return "\n".join(lines)


def title(result: dict) -> str:
    config = result["config"]
    lora = f"LoRA r={config['lora_r']}" if config["lora_r"] else "full fine-tuning"
    rows = f"{config['per_device_train_batch_size']} x {config['max_seq_len']} tokens"
    images = f"{counted(config['images_per_sample'], 'image')} a row"
    checkpointing = "checkpointing" if config["gradient_checkpointing"] else "no checkpointing"
    how = {"predict": "predicted", "measure": "measured", "both": "predicted and measured"}[result["mode"]]
    parts = [lora, config["mixed_precision"], rows, images, checkpointing, config["attn_implementation"]]
    strategy = config["strategy"]
    if strategy != "single":
        offload = "" if config["offload"] == "none" else f", {config['offload']} offloaded"
        strategy += f" on {config['world_size']} process{'es' * (config['world_size'] > 1)}{offload}"
    return f"{result['model']}, {', '.join(parts)}, {strategy}: {how} for {config['device']}"


def breakdown_lines(result: dict) -> list[str]:
    """At the peak, largest first, with the tensors that make up most of it."""
    total = result["peak_allocated_bytes"]
    lines = ["At the peak:"]
    for category, nbytes in sorted(result["breakdown"].items(), key=lambda pair: -pair[1]):
        if nbytes >= total / 1000:
            bar = "#" * round(BAR_WIDTH * nbytes / total)
            lines.append(f"  {TITLES[category]:<20}{size(nbytes):>12}  {nbytes / total:>6.1%}  {bar}")
    lines.append("Largest tensors:")
    for tensor in result["largest_tensors"][:5]:
        shape, owner = " x ".join(map(str, tensor["shape"])), tensor["module"] or TITLES[tensor["category"]]
        lines.append(f"  {tensor['bytes'] / MIB:>9.2f} MiB  {shape} {tensor['dtype']}, {owner}")
    return lines


def total_lines(result: dict) -> list[str]:
    return [f"  {what:<28}{text:>12}" for what, text in totals(result)]


def totals(result: dict) -> list[tuple[str, str]]:
    """Each figure of memory by name."""
    rows = [("allocated by tensors", "peak_allocated_bytes"), ("reserved by the allocator", "peak_reserved_bytes")]
    rows += [("on the device, in all", "device_bytes"), ("in host memory", "host_bytes")]
    rows += [("a checkpoint on the disk", "checkpoint_bytes")]
    return [(what, size(result[key])) for what, key in rows if key in result]


def phase_lines(result: dict) -> list[str]:
    """The most that tensors take in each phase of a run."""
    peaks = [f"{phase} {size(nbytes)}" for phase, nbytes in result.get("phases", {}).items() if nbytes]
    return [f"  peaks: {', '.join(peaks)}"] if peaks else []


def time_lines(result: dict) -> list[str]:
    return [f"  {what}: {text}" for what, text in time_text(result)]


def time_text(result: dict) -> list[tuple[str, str]]:
    """What is known of the time, by name: of a prediction for a GPU."""
    if result.get("step_seconds") is None:
        return []
    return [("an update, estimated", f"{duration(result)}, {result['tokens_per_second']:,.0f} tokens a second")]


def duration(result: dict) -> str:
    """An update's seconds, to three digits."""
    seconds = result.get("step_seconds")
    return "" if seconds is None else f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


def verdict(result: dict) -> str:
    budget, needed = result["budget_bytes"], result["device_bytes"]
    config = result["config"]
    card = GPUS[config["gpu"]].title if config["budget_gib"] is None else "the budget"
    if result["fits"]:
        return f"FITS {card} ({size(budget)}): {size(budget - needed)} to spare."
    return f"DOES NOT FIT {card} ({size(budget)}): {size(needed - budget)} too much."


def sweep_table(rows: list[dict], keys: list[str]) -> str:
    """A Markdown row for each configuration: the flags that set it apart, what it needs, how long an update takes, and
    whether it fits."""
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "host_bytes", "budget_bytes")
    cells = [
        [row["config"][key] for key in keys]
        + [size(row[name]) if name in row else "" for name in names]
        + [duration(row), "yes" if row["fits"] else "**no**"]
        for row in rows
    ]
    return markdown_table([*keys, "allocated", "reserved", "device", "host", "budget", "update", "fits"], cells)


def as_flags(changes: dict[str, Any]) -> str:
    """As one would type them."""
    return shlex.join(flag_words(changes))
