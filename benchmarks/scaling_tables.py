"""The tables of docs/scaling.md, from results/gpu/scaling.json."""

from typing import Any

from benchmarks.memory_tables import gib
from benchmarks.rows import read_result
from utils import markdown_table


RESULT = "gpu/scaling.json"
SENT = (2, 8, 64)  # numbers of processes of which the traffic is shown


def scaling_table() -> str:
    """Time and memory of each strategy, and how near the prediction of the device comes."""
    result = read_result(RESULT)
    cells = []
    for row in result["rows"]:
        measured, predicted = row["measured"], row["predicted"]
        error = predicted["device_bytes"] / measured["device_bytes"] - 1
        cells.append([title(row["flags"]), row["flags"]["world_size"], row["flags"]["strategy"]])
        cells[-1] += [f"{1000 * measured['step_seconds']:.0f} ms", f"{tokens_per_second(row):,.0f}"]
        cells[-1] += [efficiency_text(row, result["rows"], key) for key in ("step_seconds", "median_seconds")]
        cells[-1] += [gib(measured["peak_allocated_bytes"], 1), gib(measured["device_bytes"], 1), f"{error:+.1%}"]
    machine = result["machine"]
    header = ["model", "GPUs", "strategy", "update", "tokens/s a GPU", "efficiency", "of medians", "allocated"]
    return f"{machine['gpu']}, NVLink, PyTorch {machine['torch']}.\n\n" + markdown_table(
        [*header, "device", "error of the predicted device"], cells
    )


def title(flags: dict[str, Any]) -> str:
    kind = "all weights" if flags.get("lora_r") == 0 else "LoRA"
    return f"{flags['model']}, {kind}, {flags.get('per_device_train_batch_size', 1)} x 2048"


def tokens_per_second(row: dict[str, Any]) -> float:
    """Of each GPU, positions of images included."""
    return 2048 * row["flags"].get("per_device_train_batch_size", 1) / row["measured"]["step_seconds"]


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]], key: str = "step_seconds") -> float | None:
    """A GPU's speed against that of one that works alone on as many rows; None: such a row was not measured. `key`: of
    the fastest update, or "median_seconds"."""
    alone = row["flags"] | {"strategy": "single", "world_size": 1}
    found = next((each for each in rows if each["flags"] == alone), None)
    return found and found["measured"][key] / row["measured"][key]


def efficiency_text(row: dict[str, Any], rows: list[dict[str, Any]], key: str) -> str:
    share = efficiency(row, rows, key)
    return "" if share is None else f"{share:.2f}"


def simulated_table() -> str:
    """The device and the traffic of up to 1000 processes, predicted."""
    found = read_result(RESULT)["simulated"]
    sizes = list(dict.fromkeys(row["flags"]["world_size"] for row in found))
    cells = []
    for name, strategy in dict.fromkeys((title(row["flags"]), row["flags"]["strategy"]) for row in found):
        rows = [row for row in found if (title(row["flags"]), row["flags"]["strategy"]) == (name, strategy)]
        by_size = {row["flags"]["world_size"]: row for row in rows}
        cells.append(
            [name, strategy, *(gib(by_size[size]["device_bytes"], 1) if size in by_size else "" for size in sizes)]
        )
        cells[-1] += [gib(by_size[size]["sent_bytes"]) for size in SENT]
    header = ["model", "strategy", *(f"{size} GPUs" for size in sizes)]
    return markdown_table([*header, *(f"sent, {size} GPUs" for size in SENT)], cells)
