"""The tables of docs/speed.md, from results/step.json, packing.json, loader.json and waiting.json."""

from typing import Any

from benchmarks.rows import RESULTS, read_result
from utils import GIB, markdown_table


def step_table() -> str:
    """Each variant's step, and how train.py's compare: on a CPU, and on a GPU where that has been measured."""
    return "\n\n".join(step_tables(name) for name in ("step.json", "gpu/step.json") if (RESULTS / name).exists())


def step_tables(name: str) -> str:
    step = read_result(name)
    versions = ", ".join(f"{name} {number}" for name, number in step["versions"].items())
    sizes = f"{step['num_parameters'] / 1e6:.0f} M parameters, 1 row of {step['num_tokens']} tokens"
    caption = f"{step['machine']}; {versions}. {sizes}, {step['label_share']:.0%} with labels, {step['dtype']}:"
    rows = []
    for row in step["rows"]:
        rows.append([variant(row["kind"], row), f"{row['median_seconds']:.2f} s", f"{row['tokens_per_second']:.0f}"])
        rows[-1] += [f"{row['share_of_matmul_rate']:.0%}", f"{row['peak_bytes'] / GIB:.2f} GiB"]
    names = ("speed_against_with_checkpointing", "speed_against_without_checkpointing", "peak_against_lowest")
    ratios = [[variant("train.py", row), *(f"{row[name]:.2f}" for name in names)] for row in step["ratios"]]
    header = ["", "tokens/s against the better with checkpointing", "without", "peak against the lowest"]
    first = markdown_table(["one step", "median", "tokens/s", "of the matrix rate", "peak"], rows)
    return "\n\n".join([caption, first, markdown_table(header, ratios)])


def variant(kind: str, row: dict[str, Any]) -> str:
    return f"{kind}, checkpointing" if row["gradient_checkpointing"] else kind


def packing_table() -> str:
    """Samples a second, packed and padded, of both kinds of samples."""
    packing = read_result("packing.json")
    parts = []
    for name, case in packing["cases"].items():
        lengths = case["lengths"]
        parts.append(
            f"{name.capitalize()}: {lengths['shortest']} to {lengths['longest']} tokens, {lengths['mean']:.0f} on "
            f"average; at most {packing['rows'] * packing['max_seq_len']} positions a micro-batch, {packing['rows']} "
            f"packed rows or {case['padded_batch_size']} padded samples:"
        )
        rows = []
        for kind, row in case["variants"].items():
            rows.append([kind, row["micro_batches"], f"{row['padding_share']:.1%}"])
            rows[-1] += [f"{row['samples_per_second']:.0f}", f"{case['speedup_of_packing'][kind]:.2f}"]
        parts.append(markdown_table(["batches", "number", "padding", "samples/s", "packed is faster by"], rows))
    return "\n\n".join(parts)


def loader_table() -> str:
    """What a worker prepares for MGM-2B, and how long the demo's steps wait."""
    loader, waiting = read_result("loader.json"), read_result("waiting.json")
    rates = [
        [run["num_workers"], f"{run['images_per_second']:.1f}", milliseconds(run["cpu_seconds_per_image"])]
        for run in loader["runs"]
    ]
    waits = []
    for run in waiting["runs"]:
        waits.append([run["num_workers"], milliseconds(run["median_step_seconds"])])
        waits[-1] += [f"{run['median_wait_seconds'] * 1000:.1f} ms", milliseconds(run["longest_wait_seconds"])]
        waits[-1] += [f"{run['waiting_share']:.1%}"]
    header = ["workers", "a step", "waits for its batch, median", "at most", "of the time"]
    parts = [f"JPEGs of 1024 x 768 to both of MGM-2B's views, {loader['machine']}:"]
    parts += [markdown_table(["workers", "images/s", "processor time an image"], rates)]
    return "\n\n".join([*parts, "The demo's steps:", markdown_table(header, waits)])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
