"""Write the tables of README and docs from what lies in results/: `python -m benchmarks.tables`. A test compares."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from memory_gpus import GIB


ROOT = Path(__file__).parent.parent
FIGURES = {"allocated": "peak_allocated_bytes", "reserved": "peak_reserved_bytes", "device": "device_bytes"}
DEFAULTS = {"lora_r": 16, "max_seq_len": 2048}


def gpu_table() -> str:
    """Each row of results/gpu/matrix.json: what was measured, and how far off the prediction is."""
    matrix = json.loads((ROOT / "results/gpu/matrix.json").read_text())
    rows = [row for row in matrix["rows"] if not row["measured"].get("oom")]
    lines = [
        f"{matrix['machine']['gpu']}, PyTorch {matrix['machine']['torch']}. MGM-2B in bf16, LoRA r=16, a row of 2048 "
        "tokens with an image, checkpointing, unless the first column says otherwise:",
        "",
        "| what differs | measured: allocated | device | error: allocated | reserved | device |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = row["measured"]
        sizes = [f"{measured[name] / GIB:.2f} GiB" for name in ("peak_allocated_bytes", "device_bytes")]
        errors = [f"{error(row, name):+.2%}" for name in FIGURES.values()]
        lines.append("| " + " | ".join([describe(row["flags"]), *sizes, *errors]) + " |")
    summary = []
    for what, name in FIGURES.items():
        errors = [error(row, name) for row in rows]
        summary.append(f"{what} {median(map(abs, errors)):.2%} (worst {max(errors, key=abs):+.2%})")
    return "\n".join([*lines, "", f"Median error: {', '.join(summary)}."])


def error(row: dict[str, Any], name: str) -> float:
    return row["predicted"][name] / row["measured"][name] - 1


def describe(flags: dict[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in flags.items() if DEFAULTS.get(name) != value]
    return ", ".join(words) or "nothing"


def lora_table() -> str:
    """Predicted for MGM-2B: what each way of training trains and takes."""
    rows = json.loads((ROOT / "results/mgm_2b.json").read_text())["lora"]
    lines = ["| trained | parameters | share | peak | device |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['trainable_params'] / row['total_params']:.2%}"
        sizes = [f"{row[name] / GIB:.2f} GiB" for name in ("peak_allocated_bytes", "device_bytes")]
        lines.append(
            f"| {what_is_trained(row['flags'])} | {row['trainable_params']:,} | {share} | {' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def what_is_trained(flags: dict[str, Any]) -> str:
    if flags["lora_r"]:
        targets = "all linear layers" if len(flags.get("lora_target_modules", ())) == 7 else "q, v, o"
        return f"LoRA r={flags['lora_r']} on {targets}; projector and mining"
    return "projector and mining alone" if "trainable_modules" in flags else "all but the towers"


PURPOSES = {
    "weights, optimizer, gradients": ("weights", "trained", "optimizer", "gradients"),
    "rounding of pinned memory": ("pinned_rounding",),
    "process": ("process",),
    "workers and batches": ("workers", "batches"),
}


def host_table() -> str:
    """Predicted for MGM-2B: the host's memory by purpose."""
    rows = json.loads((ROOT / "results/mgm_2b.json").read_text())["host"]
    header = ["config", "trained", "processes", *PURPOSES, "other", "sum", "loading"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        flags, host = row["flags"], row["host"]
        sizes = [sum(host.get(name, 0) for name in names) for names in PURPOSES.values()]
        sizes += [sum(host.values()) - sum(sizes), sum(host.values()), row["loading_bytes"]]
        first = [f"`{Path(flags['config_file']).name}`", "all" if flags.get("lora_r") == 0 else "LoRA r=16"]
        cells = [*first, str(flags.get("world_size", 1)), *(f"{size / GIB:.2f}" for size in sizes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In GiB (2**30 bytes)."])


TABLES = {"gpu": gpu_table, "lora": lora_table, "host": host_table}
DOCUMENTS = ("README.md", "docs/lora.md", "docs/host_memory.md")


def with_tables(text: str) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        if start:
            _, end, after = rest.partition(f"<!-- /{name} -->")
            text = before + start + table() + "\n" + end + after
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(with_tables(path.read_text()))
