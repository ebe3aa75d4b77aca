"""How near the predicted time of a step comes on a GPU: results/gpu/step_time.json and the table of docs/speed.md.

    python -m benchmarks.step_time --mode measure    # needs a GPU of 80 GB; adds the rows that are missing
    python -m benchmarks.step_time --mode fit        # prints the host's constants from the fitted rows
    python -m benchmarks.step_time --mode predict    # needs no GPU; predicts all rows, each 5 to 60 seconds

The constants of memory/step_time.py come from the rows with `"fitted": true`. The errors that are reported are those
of the others. The last line on stdout is JSON.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_matrix import ZERO2, ZERO3
from benchmarks.rows import Rows, RowsConfig, gpu_machine, gpu_of, or_failure
from benchmarks.speed_tables import STEP_TIMES
from benchmarks.tables import write_tables
from memory.cards import GPUS
from memory.config import ProbeConfig
from memory.gpus import Speed
from memory.measure_time import measure_time
from memory.predict import trace_step
from memory.step_time import CONSTANTS, PYTHON, Constants, busy_seconds, issue_seconds, step_seconds
from memory.work import Operation
from utils import UserError, check_choice, flag, run_script, write_json


FITTED = [
    {},
    {"gradient_checkpointing": False},
    {"per_device_train_batch_size": 4},
    {"gradient_checkpointing": False, "per_device_train_batch_size": 4},
    {"mlp_tiles": 1},
    {"quantize": "nf4"},
    {"lora_r": 0},
    {"model": "qwen3-vl-2b"},
    {"model": "gemma-3-4b", "gradient_checkpointing": False, "max_seq_len": 1024},
    {"model": "qwen3.5-2b"},  # many small operators
    ZERO3,
]
HELD_OUT = [
    {"max_seq_len": 1024},
    {"max_seq_len": 4096},
    {"max_seq_len": 512, "images_per_sample": 0},
    {"max_seq_len": 1024, "gradient_checkpointing": False},
    {"max_seq_len": 1024, "mlp_tiles": 1, "per_device_train_batch_size": 2},
    {"lora_target_modules": ["all-linear"]},
    {"loss": "full"},
    {"images_per_sample": 0},
    {"images_per_sample": 3},
    {"gradient_accumulation_steps": 4, "max_seq_len": 1024},
    {"quantize": "nf4", "lora_target_modules": ["all-linear"], "max_seq_len": 1024},
    {"lora_r": 0, "max_seq_len": 1024, "gradient_checkpointing": False},
    {"packing": True, "per_device_train_batch_size": 2},
    {"checkpoint_num_layers": 6, "checkpoint_num_mlps": 6},
    {"attn_implementation": "eager", "max_seq_len": 1024},
    ZERO2,
    ZERO3 | {"max_seq_len": 1024},
    {"model": "qwen3-vl-2b", "gradient_checkpointing": False, "max_seq_len": 1024},
    {"model": "qwen3-vl-2b", "per_device_train_batch_size": 4},
    {"model": "qwen3-vl-2b", "max_seq_len": 512, "images_per_sample": 0},
    {"model": "gemma-3-4b"},
    {"model": "gemma-3-4b", "per_device_train_batch_size": 2, "lora_target_modules": ["all-linear"]},
    {"model": "smolvlm2-2.2b"},
    {"model": "smolvlm2-2.2b", "gradient_checkpointing": False},
    {"model": "smolvlm2-2.2b", "per_device_train_batch_size": 4, "mlp_tiles": 1},
    {"model": "qwen3.5-2b", "gradient_checkpointing": False, "max_seq_len": 1024},
    {"model": "ministral-3-3b"},
    {"model": "qwen2.5-vl-3b"},
]
ROWS = [
    {"fitted": is_fitted, "flags": flags}
    for is_fitted, group in ((True, FITTED), (False, HELD_OUT))
    for flags in group
]

HOST_BOUND = 0.7  # the GPU's share of an update up to which it does not hold the host up
MIN_GAIN = 1e-3  # by which the error must fall for a constant to change


@dataclass(kw_only=True)
class StepTimeConfig(RowsConfig):
    mode: str = flag("predict", "measure | fit | predict")
    output: str = "results/gpu/step_time.json"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("measure", "fit", "predict"))


def main(config: StepTimeConfig) -> dict[str, Any]:
    path = Path(config.output)
    if config.mode == "measure":
        return {"rows": len(measure_rows(path, config.overwrite)), "output": config.output}
    if not path.exists():
        raise UserError(f"--output {path}: there are no measured rows; --mode measure makes them, on a GPU")
    return fit_rows(path) if config.mode == "fit" else predict_rows(path)


def measure_rows(path: Path, overwrite: bool) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(path, {"version": 1}, overwrite, machine=gpu_machine())
    missing = rows.missing(row["flags"] for row in ROWS)
    for row in (row for row in ROWS if row["flags"] in missing):
        rows.add(row | {"measured": measure_row(row_config("measure", gpu_of(rows.result), row["flags"]))})
    return rows.result["rows"]


def measure_row(config: ProbeConfig) -> dict[str, Any]:
    return or_failure(measure_time, config, config.launch)


def predict_rows(path: Path) -> dict[str, Any]:
    """Predict all rows anew, and say how near the held-out ones come. Returns the latter."""
    result = json.loads(path.read_text())
    gpu = gpu_of(result)
    speed = GPUS[gpu].speed
    for row in measured_rows(result):
        probed, work, operations = traced(gpu, row["flags"])
        row["predicted"] = {
            "step_seconds": step_seconds(work, speed, probed.gradient_accumulation_steps),
            "busy_seconds": busy_seconds(operations, speed),
            "num_kernels": sum(operation.launches + (operation.kind == "transfer") for operation in operations),
        }
        print(row, flush=True)
    held_out = [row for row in measured_rows(result) if not row["fitted"]]
    result["held_out"] = {name: accuracy(held_out, name) for name in STEP_TIMES}
    write_json(path, result)
    write_tables()
    return result["held_out"]


def measured_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "failed" not in row["measured"]]


def traced(gpu: str, flags: dict[str, Any]) -> tuple[ProbeConfig, list[list[Operation]], list[Operation]]:
    """A row's configuration, the operations of its first and last micro-batch, and those of the whole update."""
    probed = row_config("predict", gpu, flags)
    work = trace_step(probed).device.work
    return probed, work, work[0] * (probed.gradient_accumulation_steps - 1) + work[-1]


def accuracy(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Errors of a predicted figure, and the share of the pairs of rows of which the slower one is told."""
    pairs = [(row["predicted"][name], row["measured"][name]) for row in rows]
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    is_in_order = [(a[0] < b[0]) == (a[1] < b[1]) for a, b in combinations(pairs, 2)]
    return {
        "rows": len(rows),
        "median_error": median(errors),
        "worst_error": max(errors),
        "pairs_in_order": sum(is_in_order) / len(is_in_order),
    }


@dataclass
class FittedRow:
    """A measured row and the operations of its update."""

    measured: dict[str, Any]
    operations: list[Operation]
    is_deepspeed: bool = False  # its backward pass includes the optimizer's step

    def squared_error(self, speed: Speed, constants: Constants) -> float:
        """Of the update, and of the host's part of it where the GPU has not held the host up."""
        pairs = [(step_seconds([self.operations], speed, constants=constants), self.measured["step_seconds"])]
        if self.measured["busy_seconds"] < HOST_BOUND * self.measured["step_seconds"] and not self.is_deepspeed:
            pairs += [
                (issue_seconds(self.operations, phase, constants), self.measured["phase_seconds"][phase])
                for phase in ("forward", "backward")
            ]
        return sum(math.log(predicted / measured) ** 2 for predicted, measured in pairs) / len(pairs)

    def squared_busy_error(self, speed: Speed, constants: Constants) -> float:
        return math.log(busy_seconds(self.operations, speed, constants) / self.measured["busy_seconds"]) ** 2


def fit_rows(path: Path) -> dict[str, Any]:
    """Print and return the constants of memory/step_time.py with which the fitted rows are predicted best: first the
    GPU's, from how long it was busy, then the host's, from the whole."""
    result, rows = json.loads(path.read_text()), []
    gpu = gpu_of(result)
    for row in (row for row in measured_rows(result) if row["fitted"]):
        probed, _, operations = traced(gpu, row["flags"])
        rows.append(FittedRow(row["measured"], operations, probed.launch.name.startswith("zero")))
    speed = GPUS[gpu].speed
    on_device = [row for row in rows if not row.is_deepspeed]  # beside copies its GPU does several things at a time
    constants = scan(
        CONSTANTS,
        [("product_share",), ("attention_share",)],
        lambda found: sum(row.squared_busy_error(speed, found) for row in on_device),
    )
    constants = scan(
        constants,
        [PYTHON, ("engine_seconds",), ("product_seconds",), ("transfer_seconds",), ("packed_seconds",)],
        lambda found: sum(row.squared_error(speed, found) for row in rows),
    )
    for row in rows:
        predicted = [step_seconds([row.operations], speed, constants=constants)]
        predicted.append(busy_seconds(row.operations, speed, constants))
        measured = [row.measured["step_seconds"], row.measured["busy_seconds"]]
        print(*(f"{p:.4f} predicted, {m:.4f} measured;" for p, m in zip(predicted, measured, strict=True)), flush=True)
    print("CONSTANTS = Constants(", *(f"    {name}={x:.3g}," for name, x in asdict(constants).items()), ")", sep="\n")
    return asdict(constants)


def scan(constants: Constants, groups: Sequence[tuple[str, ...]], error: Callable[[Constants], float]) -> Constants:
    """The constants with these changed, a group at a time and in ever smaller steps, as long as the error falls. Those
    of a group keep their proportions."""
    best = error(constants)
    for factor in (1.5, 1.2, 1.05, 1.02):
        is_falling = True
        while is_falling:
            is_falling = False
            for names, change in ((names, change) for names in groups for change in (factor, 1 / factor)):
                changed = replace(constants, **{name: getattr(constants, name) * change for name in names})
                if (found := error(changed)) < best * (1 - MIN_GAIN):
                    constants, best, is_falling = changed, found, True
    return constants


def row_config(mode: str, gpu: str, flags: dict[str, Any]) -> ProbeConfig:
    """Of training steps alone, without held-out answers."""
    fixed = {"model": "mgm-2b", "gpu": gpu, "mode": mode, "device": "cuda", "eval_samples": 0}
    return ProbeConfig(**(fixed | flags))


if __name__ == "__main__":
    run_script(main, StepTimeConfig)
