"""Time and memory of each strategy on two GPUs: results/gpu/scaling.json and the tables of docs/scaling.md.

    python -m benchmarks.scaling --mode measure    # needs two GPUs of 80 GB; adds the rows that are missing
    python -m benchmarks.scaling --mode predict    # needs no GPU; predicts the measured rows, each 10 to 90 seconds
    python -m benchmarks.scaling --mode simulate   # needs no GPU; up to 1000 processes, each row 20 to 60 seconds

Each process has the same number of rows, so two do twice the work of one. `--models` takes those models' rows alone.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rows import Rows, RowsConfig, gpu_machine, gpu_of, or_failure
from benchmarks.step_time import row_config
from benchmarks.tables import write_tables
from child_processes import process_pool
from memory.config import ProbeConfig
from memory.measure_time import measure_time
from memory.predict import summarize, trace_step
from memory.probe import probe
from memory.work import COPYING
from utils import UserError, check_choice, flag, run_script, write_json


SINGLE, DDP, ZERO2, ZERO3, FSDP2 = (
    {"strategy": name, "world_size": 1 if name == "single" else 2}
    for name in ("single", "ddp", "zero2", "zero3", "fsdp2")
)
FOUR = {"per_device_train_batch_size": 4}
SMALL, LARGE, LARGE_IN_FULL = {"model": "mgm-2b"}, {"model": "qwen3-vl-8b"}, {"model": "qwen3-vl-8b", "lora_r": 0}
MODELS = (SMALL["model"], LARGE["model"])
ROWS = [
    *(SMALL | FOUR | each for each in (SINGLE, DDP, ZERO2, ZERO3, FSDP2)),
    *(LARGE | FOUR | each for each in (SINGLE, DDP, ZERO3, FSDP2)),
    *(LARGE_IN_FULL | each for each in (FSDP2, ZERO3)),
    *(SMALL | each for each in (SINGLE, DDP)),
]
PREDICTED = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "step_seconds", "last_rank")
NUM_PROCESSES = (2, 4, 8, 64, 1000)
SIMULATED = [
    model | FOUR | each | {"world_size": num}
    for model in (SMALL, LARGE)
    for each in (DDP, ZERO3, FSDP2)
    for num in NUM_PROCESSES
    if num < 1000 or each != ZERO3  # DeepSpeed walks over all processes for each weight
]
NUM_BESIDE = 2  # rows whose processes start, and wait for their turn, beside the one that is measured


@dataclass(kw_only=True)
class ScalingConfig(RowsConfig):
    mode: str = flag("predict", "measure | predict | simulate")
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "whose rows"})
    output: str = "results/gpu/scaling.json"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, tuple(MODES))
        for model in self.models:
            check_choice("models", model, MODELS)
        if self.mode != "measure" and not Path(self.output).is_file():
            raise UserError(f"--output {self.output}: there is no such file, --mode measure writes it")


def main(config: ScalingConfig) -> dict[str, Any]:
    path = Path(config.output)
    result = MODES[config.mode](config, path)
    return {"rows": len(result["rows"]), "output": config.output}


def measure_rows(config: ScalingConfig, path: Path) -> dict[str, Any]:
    """A row's processes start while those before are measured: their imports take longer than their updates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(path, {"version": 1}, config.overwrite, machine=gpu_machine())
    missing = rows.missing(flags for flags in ROWS if flags["model"] in config.models)
    with tempfile.TemporaryDirectory() as folder, process_pool(1 + NUM_BESIDE) as pool:
        ends = [Path(folder) / str(index) for index in range(len(missing) + 1)]  # that of the row before, and its own
        ends[0].touch()
        futures = [
            pool.submit(measure_row, row_config("measure", gpu_of(rows.result), flags), *ends[index : index + 2])
            for index, flags in enumerate(missing)
        ]
        for flags, future in zip(missing, futures, strict=True):
            rows.add({"flags": flags, "measured": future.result()})
    return rows.result


def measure_row(config: ProbeConfig, before: Path, end: Path) -> dict[str, Any]:
    """Once the file `before` exists. In the end, `end` does."""
    try:
        return or_failure(measure_time, config, config.launch, partial(wait_for, before))
    finally:
        end.touch()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def predict_rows(config: ScalingConfig, path: Path) -> dict[str, Any]:
    """Predict the measured rows anew: the code may have changed since."""
    result = json.loads(path.read_text())
    for row in (row for row in result["rows"] if row["flags"]["model"] in config.models):
        predicted = probe(row_config("predict", gpu_of(result), row["flags"]))
        row["predicted"] = {name: predicted[name] for name in PREDICTED if name in predicted}
        print(row, flush=True)
    write_json(path, result)
    write_tables()
    return result


def simulate_rows(config: ScalingConfig, path: Path) -> dict[str, Any]:
    """Predict more processes than there are GPUs: the device, and what a process sends in an update."""
    rows = Rows(path, {"version": 1})
    for flags in rows.missing((flags for flags in SIMULATED if flags["model"] in config.models), "simulated"):
        probed = row_config("predict", gpu_of(rows.result), flags)
        record = trace_step(probed)
        operations = [operation for batch in record.device.work for operation in batch]
        sent = [each.nbytes for each in operations if each.kind == "transfer" and each.name not in COPYING]
        device_bytes = summarize(record, probed)["device_bytes"]
        rows.add({"flags": flags, "device_bytes": device_bytes, "sent_bytes": sum(sent)}, "simulated")
    write_tables()
    return rows.result


MODES = {"measure": measure_rows, "predict": predict_rows, "simulate": simulate_rows}


if __name__ == "__main__":
    run_script(main, ScalingConfig)
