"""Write the tables of README.md and docs/ from the files in results/, and that of the cards from memory/cards.py:

    python -m benchmarks.tables    # in seconds

A document has the markers `<!-- NAME -->` and `<!-- /NAME -->` around each table. Tests compare them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chinese import with_chinese
from benchmarks.memory_tables import (
    checkpointed_table,
    checkpointing_table,
    gib,
    ladder_table,
    loss_table,
    zero_stages_table,
)
from benchmarks.plan_tables import plans_table, sweep_table
from benchmarks.rows import RESULTS, ROOT, gpu_of, read_result
from benchmarks.scaling_tables import scaling_table, simulated_table
from benchmarks.speed_tables import answering_table, loader_table, packing_table, step_table, step_time_table
from memory.cards import GPUS, RESERVE_GIB
from memory.gpus import CUBLAS_HOPPER
from models.family import packs
from tests.tiny_families import FAMILIES, TRAINED
from utils import GIB, MIB, UserError, markdown_table, run_script


FIGURES = {"allocated": "peak_allocated_bytes", "reserved": "peak_reserved_bytes", "device": "device_bytes"}
DEFAULTS = {"lora_r": 16, "max_seq_len": 2048}
DOCUMENTS = (
    "README.md",
    "README.zh-CN.md",
    *(
        f"docs/{name}.md"
        for name in (
            "gpu_guide",
            "gpus",
            "memory",
            "memory_accuracy",
            "speed",
            "planner",
            "lora",
            "host_memory",
            "scaling",
            "evaluation",
        )
    ),
    "docs/evaluation.zh-CN.md",
    "docs/gpu_guide.zh-CN.md",
    "docs/gpus.zh-CN.md",
    "docs/host_memory.zh-CN.md",
    "docs/interview.md",
    "docs/interview.zh-CN.md",
    "docs/lora.zh-CN.md",
    "docs/memory.zh-CN.md",
    "docs/planner.zh-CN.md",
    "docs/scaling.zh-CN.md",
    "docs/speed.zh-CN.md",
)
GPU_TESTS, TWO_GPU_TESTS = (RESULTS / f"gpu/{name}.json" for name in ("tests", "tests_two_gpus"))
FAMILIES_MATRIX = RESULTS / "families.json"
CPU_MATRIX, GPU_MATRIX = RESULTS / "cpu/matrix.json", RESULTS / "gpu/matrix.json"
GPU_FAMILIES = RESULTS / "gpu/families.json"
HEADLINE, MGM_2B = RESULTS / "headline.json", RESULTS / "mgm_2b.json"
HEADLINE_CARDS = ("rtx3070", "rtx3060", "rtxa4000", "rtx4090")  # 8, 12, 16 and 24 GB
STRATEGIES = {  # the headline's, on one process
    "single": {},
    "zero2": {"config_file": "accelerate_configs/zero2.yaml"},
    "zero3 + offload": {"config_file": "accelerate_configs/zero3.yaml"},
}


def gpu_table() -> str:
    """results/gpu/matrix.json."""
    matrix = read_result(GPU_MATRIX)
    # `--mode measure` adds rows without a prediction: `--mode predict` adds that.
    rows = [row for row in matrix["rows"] if "predicted" in row and not row["measured"].get("oom")]
    parts = [
        f"{matrix['machine']['gpu']}, PyTorch {matrix['machine']['torch']}. Sizes are measured; error = "
        "prediction / measurement - 1. Default: bf16, LoRA r=16, one row of 2048 tokens with an image, checkpointing.",
        *error_rows(rows),
    ]
    return "\n\n".join(parts)


def error_rows(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what was measured and the prediction's errors, and a line with their medians."""
    cells = []
    for row in rows:
        sizes = [gib(row["measured"][name]) for name in ("peak_allocated_bytes", "device_bytes")]
        cells.append([describe(row["flags"]), *sizes, *(f"{error(row, name):+.2%}" for name in FIGURES.values())])
    header = ["flags", "allocated", "device", "error: allocated", "error: reserved", "error: device"]
    summary = []
    for what, name in FIGURES.items():
        errors = [error(row, name) for row in rows]
        summary.append(f"{what} {median(map(abs, errors)):.2%} (worst {max(errors, key=abs):+.2%})")
    return [markdown_table(header, cells), f"Median error: {', '.join(summary)}."]


def gpu_families_table() -> str:
    """results/gpu/families.json: models of other families at their real size."""
    matrix = read_result(GPU_FAMILIES)
    rows = [row for row in matrix["rows"] if "predicted" in row]
    return "\n\n".join([f"{matrix['machine']['gpu']}, PyTorch {matrix['machine']['torch']}.", *error_rows(rows)])


def error(row: dict[str, Any], name: str) -> float:
    return row["predicted"][name] / row["measured"][name] - 1


def describe(flags: dict[str, Any]) -> str:
    words = []
    for name, value in flags.items():
        if DEFAULTS.get(name) != value:
            text = (" ".join(value) or "none") if isinstance(value, list) else value
            words.append(text if name == "model" else f"{name} {text}")
    return ", ".join(words) or "defaults"


def lora_table() -> str:
    """Predicted for MGM-2B: the parameters that each way of training trains, and the memory it needs."""
    cells = []
    for row in read_result(MGM_2B)["lora"]:
        share = f"{row['trainable_params'] / row['total_params']:.2%}"
        cells.append([what_is_trained(row["flags"]), f"{row['trainable_params']:,}", share])
        cells[-1] += [gib(row["peak_allocated_bytes"]), gib(row["device_bytes"])]
    return markdown_table(["trained", "parameters", "share", "allocated", "device"], cells)


def what_is_trained(flags: dict[str, Any]) -> str:
    if flags["lora_r"]:
        targets = "all linear layers" if "lora_target_modules" in flags else "q, v, o"
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
    cells = []
    for row in read_result(MGM_2B)["host"]:
        flags, host = row["flags"], row["host"]
        sizes = [sum(host.get(name, 0) for name in names) for names in PURPOSES.values()]
        sizes += [sum(host.values()) - sum(sizes), sum(host.values())]
        trained = "all" if flags.get("lora_r") == 0 else "LoRA r=16"
        cells.append([f"`{Path(flags['config_file']).name}`", trained, flags.get("world_size", 1)])
        cells[-1] += [f"{size / GIB:.2f}" for size in sizes]
    header = ["config", "trained", "processes", *PURPOSES, "other", "sum"]
    return markdown_table(header, cells)


def cpu_table() -> str:
    """Each row of results/cpu/matrix.json: those of one process, then those under ZeRO-3."""
    rows = read_result(CPU_MATRIX)["rows"]
    parts = []
    for title, kept in (("One process", False), ("ZeRO-3 with everything offloaded, device and host together", True)):
        part = [row for row in rows if ("strategy" in row["flags"]) == kept]
        cells = []
        for row in part:
            flags = {key: value for key, value in row["flags"].items() if key not in ("model", "strategy", "offload")}
            sizes = [f"{row[name] / MIB:.2f} MiB" for name in ("measured_bytes", "predicted_bytes")]
            cells.append([row["flags"]["model"], describe(flags), *sizes, f"{row['error']:+.3%}"])
        errors = [row["error"] for row in part]
        parts += [
            f"**{title}**",
            markdown_table(["model", "flags", "measured", "predicted", "error"], cells),
            f"{len(part)} rows. Median error {median(map(abs, errors)):.3%}, worst {max(errors, key=abs):+.3%}, "
            f"furthest below the measurement {min(*errors, 0):+.3%}.",
        ]
    return "\n\n".join(parts)


def families_table() -> str:
    """results/families.json: for each family the peak of its first row, and the largest error of its rows."""
    rows = read_result(FAMILIES_MATRIX)["rows"]
    cells = []
    for family in dict.fromkeys(row["flags"]["family"] for row in rows):
        own = [row for row in rows if row["flags"]["family"] == family]
        worst = max(own, key=lambda row: abs(row["error"]))
        flags = {name: value for name, value in worst["flags"].items() if name != "family"}
        size = f"{own[0]['measured_bytes'] / MIB:.2f} MiB"
        cells.append([family, len(own), size, f"{worst['error']:+.3%}", describe(flags)])
    errors = [row["error"] for row in rows]
    return "\n\n".join(
        [
            markdown_table(["family", "rows", "measured, first row", "worst error", "with"], cells),
            f"{len(cells)} families, {len(rows)} rows. Median error {median(map(abs, errors)):.3%}, worst "
            f"{max(errors, key=abs):+.3%}, furthest below the measurement {min(*errors, 0):+.3%}.",
        ]
    )


def trained_families_table() -> str:
    """What tests do with a tiny model of each family, and how near its predictions are in results/families.json."""
    rows, cells = read_result(FAMILIES_MATRIX)["rows"], []
    for family, title in TRAINED.items():
        errors = [row["error"] for row in rows if row["flags"]["family"] == family]
        if not errors:
            raise UserError(f"results/families.json has no row of {family}: python -m benchmarks.families measures it")
        worst = max(errors, key=abs)
        packing = "yes" if packs(FAMILIES[family]()) else "refused"
        cells.append([title, f"`{family}`", f"within {abs(worst):.3%}", "yes", "yes", "yes", packing])
    return markdown_table(["models", "`model_type`", "predicted", "trained", "evaluated", "merged", "packed"], cells)


def headline_table(is_short: bool = False) -> str:
    """Each row of results/headline.json: what it needs, which cards have that much, and what other estimators say.

    The README's short form has the usual rank and full fine-tuning. ZeRO-2 is not in it: it splits nothing on one GPU.
    """
    headline = read_result(HEADLINE)
    estimates = headline["estimates"]
    capacities = {gpu: GPUS[gpu].capacity_bytes for gpu in HEADLINE_CARDS}
    card = GPUS[gpu_of(read_result(GPU_MATRIX))].name
    columns = ["rank", "tokens", "strategy", *(GPUS[gpu].title for gpu in HEADLINE_CARDS)]
    columns += ["device, predicted", f"device, measured on an {card}", "host RAM"]
    columns += [] if is_short else ["accelerate's estimate", "DeepSpeed's estimate"]
    cells = []
    for row in headline["rows"]:
        rank, length, strategy = row["flags"].values()
        if is_short and (rank not in (16, 0) or strategy == "zero2"):
            continue
        fits = ["yes" if row["device_bytes"][gpu] <= capacity else "no" for gpu, capacity in capacities.items()]
        sizes = [row["device_bytes"]["rtx4090"], measured_device_bytes(row), row["host_bytes"]]
        sizes += [] if is_short else [estimates["accelerate"], estimates.get(strategy)]
        sizes = [f"{size / GIB:.1f} GiB" if size is not None else "" for size in sizes]
        cells.append([rank or "full", length, strategy, *fits, *sizes])
    return markdown_table(columns, cells)


def measured_device_bytes(row: dict[str, Any]) -> int | None:
    """What the row with the same flags in results/gpu/matrix.json used of the GPU, if it was measured with the same
    code: then the two predictions differ by the size of cuBLAS's workspaces at most, which depends on the card."""
    matrix = read_result(GPU_MATRIX)
    rank, length, strategy = row["flags"].values()
    flags = {"lora_r": rank, "max_seq_len": length} | STRATEGIES[strategy]
    for found in (found for found in matrix["rows"] if DEFAULTS | found["flags"] == flags):
        predicted_bytes = found.get("predicted", {}).get("peak_allocated_bytes", 0)
        is_same_code = abs(predicted_bytes - row["peak_allocated_bytes"]) < 2 * CUBLAS_HOPPER
        if is_same_code and found["measured"].get("oom") is None and "failed" not in found["measured"]:
            return found["measured"]["device_bytes"]
    return None


def gpu_tests_table() -> str:
    """How many tests have passed on GPUs, and at which commit."""
    names = ["passed", "failed", "skipped", "seconds"]
    cells = []
    for path in (GPU_TESTS, TWO_GPU_TESTS):
        record = read_result(path)
        cells.append([f"{record['num_gpus']} x {record['gpu']}", record["torch"], record["commit"][:8]])
        cells[-1] += [record[name] for name in names]
    return markdown_table(["GPUs", "PyTorch", "commit", *names], cells)


def cards_table() -> str:
    """Each card that `--gpu` knows."""
    cells = []
    for key, gpu in GPUS.items():
        source = "measured" if gpu.is_measured else f"the nominal size less {RESERVE_GIB} GiB"
        if gpu.source:
            repository, number = gpu.source.split(" #")
            source = f"[{gpu.source}](https://github.com/{repository}/issues/{number})"
        margin = f"not measured, {gib(gpu.margin_bytes)}" if gpu.margin_bytes else "measured"
        cells.append([f"`{key}`", gpu.title, gib(gpu.capacity_bytes), "yes" if gpu.has_bf16 else "no", margin, source])
    header = ["`--gpu`", "card", "capacity", "bf16", "CUDA's own memory, margin", "capacity from"]
    return markdown_table(header, cells)


TABLES = {
    "cards": cards_table,
    "gpu-tests": gpu_tests_table,
    "headline": headline_table,
    "headline-short": partial(headline_table, is_short=True),
    "gpu": gpu_table,
    "gpu-families": gpu_families_table,
    "cpu": cpu_table,
    "families": families_table,
    "trained-families": trained_families_table,
    "ladder": ladder_table,
    "loss": loss_table,
    "step": step_table,
    "step-time": lambda: step_time_table(describe),
    "plans": plans_table,
    "sweep": sweep_table,
    "packing": packing_table,
    "scaling": scaling_table,
    "simulated": simulated_table,
    "loader": loader_table,
    "answering": answering_table,
    "lora": lora_table,
    "host": host_table,
    "checkpointed": checkpointed_table,
    "zero-stages": zero_stages_table,
    "checkpointing": checkpointing_table,
}
TABLES = with_chinese(TABLES)


def with_tables(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """The text with new tables between its markers."""
    for name, table in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if start and end:
            text = before + start + table() + "\n" + end + after
    return text


def write_tables() -> None:
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(with_tables(document.read_text()))


@dataclass(kw_only=True)
class NoFlags:
    """Of a script that has none: `run_script` refuses what is typed."""


def main(_: NoFlags) -> dict[str, Any]:
    write_tables()
    return {"documents": list(DOCUMENTS)}


if __name__ == "__main__":
    run_script(main, NoFlags)
