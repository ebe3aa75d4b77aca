"""The tables of docs/memory.md: what each technique saves, and the ways to compute the loss."""

from typing import Any

from benchmarks.rows import read_result
from utils import GIB, MIB, markdown_table


LOSSES = {"a CPU": "loss_cpu.json", "a GPU": "loss_cuda.json"}


def ladder_table() -> str:
    """results/ladder.json: each technique added to those above it, what it saves when used alone, and the peak with
    all others but without it."""
    ladder = read_result("ladder.json")
    start = ladder["rungs"][0]["peak_allocated_bytes"]
    without = {row["title"]: gib(row["peak_allocated_bytes"]) for row in ladder["without"]}
    alone = {row["title"]: gib(start - row["peak_allocated_bytes"]) for row in ladder["alone"]}
    rows = []
    for title, row in zip(ladder_titles(ladder), [*ladder["rungs"], *ladder["branches"]], strict=True):
        rows.append([title, gib(row["peak_allocated_bytes"]), gib(row["device_bytes"])])
        rows[-1] += [f"{row['flops'] / 1e12:.1f}" if row["flops"] else ""]
        rows[-1] += [alone.get(row["title"], ""), without.get(row["title"], "")]
    header = ["technique", "allocated", "device, RTX 4090", "TFLOP a step", "saved when used alone", "peak without it"]
    return markdown_table(header, rows)


def ladder_titles(ladder: dict[str, Any]) -> list[str]:
    """Each rung adds to those above it; a branch adds to all rungs, not to the other branch."""
    rungs = [("+ " if index else "") + row["title"] for index, row in enumerate(ladder["rungs"])]
    return rungs + [f"{word} {row['title']}" for word, row in zip(("then", "or"), ladder["branches"], strict=True)]


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def loss_table() -> str:
    """results/loss_*.json: the same loss computed in different ways, on each device."""
    parts = []
    for device, name in LOSSES.items():
        found = read_result(name)
        config = found["config"]
        labelled = round(config["tokens"] * config["label_share"])
        rows = [
            [way, f"{row['peak_bytes'] / MIB:.0f} MiB", f"{1000 * row['seconds']:.0f} ms"]
            + [f"{row['gradient_error']:.1e}"]
            for way, row in found["rows"].items()
        ]
        parts += [
            f"On {device} ({found['device']}, PyTorch {found['torch']}): {config['tokens']} tokens, {labelled} of "
            f"them labelled, {config['vocab_size']:,} vocabulary entries, hidden size {config['hidden_size']}.",
            markdown_table(["method", "memory on top of the inputs", "time", "error of the gradient"], rows),
        ]
    return "\n\n".join(parts)
