"""The tables of docs/speed.md, from results/step.json, packing.json, loader.json and waiting.json."""

import json
from pathlib import Path
from typing import Any

from memory_gpus import GIB
from utils import markdown_table


RESULTS = Path(__file__).parent.parent / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def step_table() -> str:
    """Each variant's step, and how train.py's compare: on a CPU, and on a GPU where that has been measured."""
    return "\n\n".join(step_tables(name) for name in ("step.json", "gpu/step.json") if (RESULTS / name).exists())


def step_tables(name: str) -> str:
    step = load(name)
    rows = [
        [
            f"{row['kind']}{', checkpointing' if row['gradient_checkpointing'] else ''}",
            f"{row['median_seconds']:.2f} s",
            f"{row['tokens_per_second']:.0f}",
            f"{row['share_of_matmul_rate']:.0%}",
            f"{row['peak_bytes'] / GIB:.2f} GiB",
        ]
        for row in step["rows"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in step["versions"].items())
    sizes = f"{step['num_parameters'] / 1e6:.0f} M parameters, 1 row of {step['num_tokens']} tokens"
    caption = f"{step['machine']}; {versions}. {sizes}, {step['label_share']:.0%} with labels, {step['dtype']}:"
    comparison = [
        [
            f"train.py{', checkpointing' if ratio['gradient_checkpointing'] else ''}",
            f"{ratio['speed_against_with_checkpointing']:.2f}",
            f"{ratio['speed_against_without_checkpointing']:.2f}",
            f"{ratio['peak_against_lowest']:.2f}",
        ]
        for ratio in step["ratios"]
    ]
    first = markdown_table(["one step", "median", "tokens/s", "of the matrix rate", "peak"], rows)
    header = ["", "tokens/s against the better with checkpointing", "without", "peak against the lowest"]
    return "\n\n".join([caption, first, markdown_table(header, comparison)])


def packing_table() -> str:
    """Samples a second, packed and padded, of both kinds of samples."""
    packing = load("packing.json")
    tables = []
    for name, case in packing["cases"].items():
        lengths = case["lengths"]
        budget = packing["rows"] * packing["max_seq_len"]
        tables.append(
            f"{name.capitalize()}: {lengths['shortest']} to {lengths['longest']} tokens, {lengths['mean']:.0f} on "
            f"average; at most {budget} positions a micro-batch, {packing['rows']} packed rows or "
            f"{case['padded_batch_size']} padded samples:"
        )
        rows = [
            [
                variant,
                row["micro_batches"],
                f"{row['padding_share']:.1%}",
                f"{row['samples_per_second']:.0f}",
                f"{case['speedup_of_packing'][variant]:.2f}",
            ]
            for variant, row in case["variants"].items()
        ]
        tables.append(markdown_table(["batches", "number", "padding", "samples/s", "packed is faster by"], rows))
    return "\n\n".join(tables)


def loader_table() -> str:
    """What a worker prepares for MGM-2B, and what the demo's steps wait."""
    loader, waiting = load("loader.json"), load("waiting.json")
    rows = [
        [
            run["num_workers"],
            f"{run['images_per_second']:.1f}",
            f"{run['cpu_seconds_per_image'] * 1000:.0f} ms",
        ]
        for run in loader["runs"]
    ]
    waits = [
        [
            run["num_workers"],
            f"{run['median_step_seconds'] * 1000:.0f} ms",
            f"{run['median_wait_seconds'] * 1000:.1f} ms",
            f"{run['longest_wait_seconds'] * 1000:.0f} ms",
            f"{run['waiting_share']:.1%}",
        ]
        for run in waiting["runs"]
    ]
    return "\n\n".join(
        [
            f"JPEGs of 1024 x 768 to both of MGM-2B's views, {loader['machine']}:",
            markdown_table(["workers", "images/s", "processor time an image"], rows),
            "The demo's steps:",
            markdown_table(["workers", "a step", "waits for its batch, median", "at most", "of the time"], waits),
        ]
    )
