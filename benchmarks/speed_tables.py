"""The tables of docs/speed.md, from step.json, packing.json, loader.json, waiting.json and gpu/step_time.json."""

import math
import textwrap
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.rows import RESULTS, read_result
from memory.cards import GPUS
from utils import GIB, markdown_table


STEP_TIMES = {"step_seconds": "seconds of an update", "busy_seconds": "of which the GPU works"}
LONGEST_REASON = 90  # letters of an error that a cell shows


def step_table() -> str:
    """Each variant's step, and how train.py's compare: on a CPU, and on a GPU where that has been measured."""
    return "\n\n".join(step_tables(name) for name in ("step.json", "gpu/step.json") if (RESULTS / name).exists())


def step_tables(name: str) -> str:
    """A table for each model, and one of the ratios."""
    step = read_result(name)
    versions = ", ".join(f"{name} {number}" for name, number in step["versions"].items())
    rate = median(row["matmul_flops_per_second"] for row in step["rows"] if "failed" not in row)
    parts = [
        f"{step['machine']}; {versions}. {step['dtype']}, {step['label_share']:.0%} of the tokens with labels. A "
        f"large matrix product runs at {rate / 1e12:.3g} TFLOP/s."
    ]
    for model in dict.fromkeys(row["flags"]["model"] for row in step["rows"]):
        rows = [row for row in step["rows"] if row["flags"]["model"] == model]
        sizes = [row["num_parameters"] for row in rows if "failed" not in row]
        title = f"**{model}**, {sizes[0] / 1e6:.0f} M parameters:" if sizes else f"**{model}**:"
        parts += [title, model_table(rows, is_gpu=step["device"] == "cuda")]
    header = ["train.py", "tokens/s against the fastest", "which is", "peak against the smallest", "which is"]
    cells = []
    for row in step["ratios"]:
        cells.append([f"{row['model']}, {size_of(row)}", f"{row['speed_against_best']:.2f}", row["fastest"]])
        cells[-1] += [f"{row['peak_against_best']:.2f}", row["smallest"]]
    return "\n\n".join([*parts, markdown_table(header, cells)] if cells else parts)


def model_table(rows: list[dict[str, Any]], is_gpu: bool) -> str:
    """One model's rows. A row that failed says why."""
    header = ["rows x tokens", "trainer", "step", "tokens/s", "of the matrix rate", "with all that runs", "peak"]
    gpu_header = ["GPU busy", "kernels", "device"]
    has_floor = is_gpu and {row["flags"]["kind"] for row in rows} == {"train.py"}
    cells = []
    for row in rows:
        flags = row["flags"]
        cells.append([size_of(flags), flags["kind"]])
        if "failed" in row:
            cells[-1] += [textwrap.shorten(row["failed"], LONGEST_REASON, placeholder=" ...")]
            cells[-1] += [""] * (len(header) - 3 + is_gpu * len(gpu_header) + has_floor)
            continue
        shares = (row["model_flops_share_of_rate"], row["hardware_flops_share_of_rate"])
        cells[-1] += [duration(row["median_seconds"]), f"{row['tokens_per_second']:.0f}"]
        cells[-1] += [*(f"{share:.0%}" for share in shares), f"{row['peak_bytes'] / GIB:.2f} GiB"]
        if is_gpu:
            activity = row["activity"]
            cells[-1] += [duration(activity["busy_seconds"]), activity["kernels"]]
            cells[-1] += [f"{row['device_bytes'] / GIB:.2f} GiB"]
        if has_floor:
            cells[-1] += [duration(row["floor_seconds"]) if row["floor_seconds"] else ""]
    return markdown_table(header + gpu_header * is_gpu + ["floor"] * has_floor, cells)


def size_of(flags: dict[str, Any]) -> str:
    """Rows, tokens and how the layers run."""
    way = flags.get("way")
    words = [f"{flags['rows']} x {flags['num_tokens']}"]
    words += ["checkpointing"] * flags["gradient_checkpointing"] + [way] * bool(way)
    return ", ".join(words)


def duration(seconds: float) -> str:
    return milliseconds(seconds) if seconds < 1 else f"{seconds:.2f} s"


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
    waiting = read_result("waiting.json")
    waits = []
    for run in waiting["runs"]:
        waits.append([run["num_workers"], milliseconds(run["median_step_seconds"])])
        waits[-1] += [f"{run['median_wait_seconds'] * 1000:.1f} ms", milliseconds(run["longest_wait_seconds"])]
        waits[-1] += [f"{run['waiting_share']:.1%}"]
    header = ["workers", "a step", "waits for its batch, median", "at most", "of the time"]
    rates = [part for name in ("loader.json", "gpu/loader.json") for part in loader_rates(read_result(name))]
    return "\n\n".join([*rates, "The demo's steps:", markdown_table(header, waits)])


# Questions of TextVQA's validation set, and tokens that the longest answer of a batch is taken to have. Of MMBench's
# dev split, questions in all their rotations, and tokens: a letter and the end.
PUBLISHED_RUNS = {"TextVQA": (5000, 10), "MMBench": (4 * 1164, 2)}
ANSWERED_TOKENS = 2  # those in `answer_seconds`


def answering_table() -> str:
    """Seconds of a batch of questions, and minutes of the two benchmarks whose scores are published for MGM-2B."""
    result = read_result("answering.json")
    rows = [(GPUS[row["flags"]["gpu"]].name, row) for row in result["predicted"]]
    rows += [(f"{result['machine']}, measured", row) for row in result.get("rows", [])]
    cells = []
    for card, row in rows:
        size, first, further = row["flags"]["batch_size"], row["answer_seconds"], row["token_seconds"]
        runs = [
            math.ceil(questions / size) * (first + (tokens - ANSWERED_TOKENS) * further)
            for questions, tokens in PUBLISHED_RUNS.values()
        ]
        cells.append([card, size, f"{first:.2f} s", milliseconds(further), *(f"{run / 60:.0f} min" for run in runs)])
    return markdown_table(["card", "`--batch_size`", "two tokens", "each further one", *PUBLISHED_RUNS], cells)


def loader_rates(loader: dict[str, Any]) -> list[str]:
    rates = [
        [run["num_workers"], f"{run['images_per_second']:.1f}", milliseconds(run["cpu_seconds_per_image"])]
        for run in loader["runs"]
    ]
    header = ["workers", "images/s", "processor time an image"]
    return [f"JPEGs of 1024 x 768 to both of MGM-2B's views, {loader['machine']}:", markdown_table(header, rates)]


def step_time_table(describe: Callable[[dict[str, Any]], str]) -> str:
    """How near the predicted time of an update comes; `describe` puts a row's flags into words."""
    result = read_result("gpu/step_time.json") if (RESULTS / "gpu/step_time.json").exists() else {}
    held_out, cells = result.get("held_out"), []
    if held_out is None:  # `--mode measure` adds rows without a prediction: `--mode predict` adds that
        return "Not measured yet."
    shares = ("median_error", "worst_error", "pairs_in_order")
    accuracies = [[title, *(f"{held_out[name][key]:.0%}" for key in shares)] for name, title in STEP_TIMES.items()]
    for row in (row for row in result["rows"] if "predicted" in row):
        cells.append([describe(row["flags"]), "yes" if row["fitted"] else ""])
        for name in STEP_TIMES:
            measured, predicted = row["measured"][name], row["predicted"][name]
            cells[-1] += [milliseconds(measured), f"{predicted / measured - 1:+.0%}"]
    header = ["MGM-2B and others", "constants come from it", "an update", "error", "the GPU works", "error"]
    parts = [
        f"{result['machine']['gpu']}, PyTorch {result['machine']['torch']}; error = prediction / measurement - 1. The "
        f"{held_out['step_seconds']['rows']} rows from which no constant comes:",
        markdown_table(["", "median error", "worst", "pairs of which the faster one is told"], accuracies),
        markdown_table(header, cells),
    ]
    return "\n\n".join(parts)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
