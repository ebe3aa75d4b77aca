"""Write the tables of README and docs from what lies in results/: `python -m benchmarks.tables`. Tests compare."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed_tables import loader_table, packing_table, step_table
from memory_gpus import GIB


ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/speed.md")
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


TABLES = {"gpu": gpu_table, "step": step_table, "packing": packing_table, "loader": loader_table}


def with_tables(text: str) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + start + table() + "\n" + end + after
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(with_tables(path.read_text()))
