"""The tables of docs/memory.md: what each technique saves, and the ways to compute the loss."""

import json
from pathlib import Path

from memory_gpus import GIB, MIB
from utils import markdown_table


RESULTS = Path(__file__).parent.parent / "results"
LOSSES = {"a CPU": "loss_cpu.json", "an H100": "loss_cuda.json"}


def ladder_table() -> str:
    """results/ladder.json: each technique added to those above it, what it saves when used alone, and the peak with
    all others but without it."""
    ladder = json.loads((RESULTS / "ladder.json").read_text())
    start = ladder["rungs"][0]["peak_allocated_bytes"]
    without = {row["title"]: gib(row["peak_allocated_bytes"]) for row in ladder["without"]}
    alone = {row["title"]: gib(start - row["peak_allocated_bytes"]) for row in ladder["alone"]}
    prefixes = ["", *["+ "] * (len(ladder["rungs"]) - 1), *["or, in the end, "] * len(ladder["branches"])]
    rows = []
    for prefix, row in zip(prefixes, [*ladder["rungs"], *ladder["branches"]], strict=True):
        rows.append([prefix + row["title"], gib(row["peak_allocated_bytes"]), gib(row["device_bytes"])])
        rows[-1] += [f"{row['flops'] / 1e12:.1f}" if row["flops"] else ""]
        rows[-1] += [alone.get(row["title"], ""), without.get(row["title"], "")]
    header = ["step by step", "allocated", "on an RTX 4090", "TFLOP a step", "alone it saves", "all but this"]
    return markdown_table(header, rows)


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def loss_table() -> str:
    """results/loss_*.json: the same loss computed in different ways, on each device."""
    parts = []
    for device, name in LOSSES.items():
        found = json.loads((RESULTS / name).read_text())
        config = found["config"]
        labelled = round(config["tokens"] * config["label_share"])
        rows = [
            [way, f"{row['peak_bytes'] / MIB:.0f} MiB", f"{1000 * row['seconds']:.0f} ms"]
            + [f"{row['gradient_error']:.1e}"]
            for way, row in found["rows"].items()
        ]
        parts += [
            f"On {device} ({found['device']}, PyTorch {found['torch']}): {config['tokens']} tokens, {labelled} of "
            f"them labelled, {config['vocab_size']:,} words, {config['hidden_size']} wide.",
            markdown_table(["the loss by way of", "memory above its inputs", "time", "error of the gradient"], rows),
        ]
    return "\n\n".join(parts)
