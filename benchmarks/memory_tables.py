"""The tables of docs/memory.md: the ladder, and the ways to work out the loss."""

import json
from pathlib import Path
from typing import Any

from utils import GIB, MIB


RESULTS = Path(__file__).parent.parent / "results"
LOSSES = {"a CPU": "loss_cpu.json", "an H100": "loss_cuda.json"}


def ladder_table() -> str:
    """results/ladder.json: each technique on top of those above it, alone from where the ladder begins, and what all
    the others come to without it."""
    ladder = json.loads((RESULTS / "ladder.json").read_text())
    start = ladder["rungs"][0]["peak_allocated_bytes"]
    without = {row["title"]: f"{row['peak_allocated_bytes'] / GIB:.2f} GiB" for row in ladder["without"]}
    alone = {row["title"]: start - row["peak_allocated_bytes"] for row in ladder["alone"]}
    lines = [
        "| technique | allocated | device, RTX 4090 | TFLOP a step | saved when used alone | peak without it |",
        "|---|---|---|---|---|---|",
    ]
    rows = [*ladder["rungs"], *ladder["branches"]]
    for title, row in zip(ladder_titles(ladder), rows, strict=True):
        saved = f"{alone[row['title']] / GIB:.2f} GiB" if row["title"] in alone else ""
        lines.append(
            "| " + " | ".join([title, *sizes(row), operations(row), saved, without.get(row["title"], "")]) + " |"
        )
    return "\n".join(lines)


def ladder_titles(ladder: dict[str, Any]) -> list[str]:
    """Each rung adds to those above it; a branch adds to all rungs, not to the other branch."""
    rungs = [("+ " if index else "") + row["title"] for index, row in enumerate(ladder["rungs"])]
    return rungs + [f"{word} {row['title']}" for word, row in zip(("then", "or"), ladder["branches"], strict=True)]


def sizes(row: dict[str, Any]) -> list[str]:
    return [f"{row[name] / GIB:.2f} GiB" for name in ("peak_allocated_bytes", "device_bytes")]


def operations(row: dict[str, Any]) -> str:
    return f"{row['flops'] / 1e12:.1f}" if row["flops"] else ""


def loss_table() -> str:
    """results/loss_*.json: the same loss in different ways, on each device."""
    parts = []
    for device, name in LOSSES.items():
        found = json.loads((RESULTS / name).read_text())
        config, rows = found["config"], found["rows"]
        labels = round(config["tokens"] * config["label_share"])
        parts += [
            f"On {device} ({found['device']}, PyTorch {found['torch']}): {config['tokens']} tokens, {labels} of them "
            f"labelled, {config['vocab_size']:,} vocabulary entries, hidden size {config['hidden_size']}.",
            "",
            "| method | memory on top of the inputs | time | error of the gradient |",
            "|---|---|---|---|",
        ]
        for way, row in rows.items():
            cells = [way, f"{row['peak_bytes'] / MIB:.0f} MiB", f"{1000 * row['seconds']:.0f} ms"]
            parts.append("| " + " | ".join([*cells, f"{row['gradient_error']:.1e}"]) + " |")
        parts.append("")
    return "\n".join(parts).strip()
