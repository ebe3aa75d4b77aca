"""Measure on a GPU what memory_probe.py predicts of MGM-2B, row by row, and set the predictions beside it.

    python -m benchmarks.gpu_matrix --mode measure    # where the GPU is: rows, and one run's allocator history
    python -m benchmarks.gpu_matrix --mode predict    # anywhere, again whenever the prediction has changed

Both write results/gpu/matrix.json; history.json.gz is for tests/test_memory_allocator.py. Running out of memory is a
result too. What else wants a GPU: benchmarks/step.py, benchmarks/loss.py, `pytest -m gpu`.
"""

import gzip
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from memory.config import ProbeConfig
from memory.launch import in_fresh_process
from memory.measure import measure
from memory.measure_gpu import measure_this_process
from memory.probe import probe
from utils import GIB, check_choice, run_script


ZERO2, ZERO3 = ({"config_file": f"accelerate_configs/{name}.yaml"} for name in ("zero2", "zero3"))
ROWS = [
    *({"lora_r": rank, "max_seq_len": length} for length in (2048, 1024) for rank in (16, 8, 32, 0)),
    ZERO3,
    {"budget_gib": 7.78},  # the defaults on an 8 GB card
    {"lora_r": 0, "loss": "full", "budget_gib": 23.63},  # the story: full fine-tuning with logits on a 24 GB card
    *({"loss": "full", "lora_r": rank, "max_seq_len": length} for length in (1024, 2048) for rank in (16, 0)),
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": False, "max_seq_len": 1024},
    {"attn_implementation": "eager"},
    ZERO3 | {"max_seq_len": 1024},
    {"quantize": "nf4"},
    {"max_seq_len": 4096},
    ZERO2,
    {"lora_target_modules": ["all-linear"]},
    {"per_device_train_batch_size": 2},
    {"images_per_sample": 3},
    {"images_per_sample": 0},
    {"packing": True},
    {"mlp_tiles": 1},
    {"gradient_accumulation_steps": 2},
    {"use_dora": True},
    {"quantize": "nf4", "max_seq_len": 1024},
    {"quantize": "nf4", "lora_target_modules": ["all-linear"]},
    ZERO3 | {"loss": "full", "max_seq_len": 1024},
    *({"loss": "full", "lora_r": rank, "max_seq_len": length} for length in (1024, 2048) for rank in (8, 32)),
    {"lora_r": 0, "optim": "sgd"},
]
HISTORY_ROW = {"max_seq_len": 1024}
FIGURES = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "host_bytes")


@dataclass(kw_only=True)
class MatrixConfig:
    mode: str = field(default="predict", metadata={"help": "measure | predict"})
    model: str = "mgm-2b"
    gpu: str = field(default="h100", metadata={"help": "the card's name in memory/gpus.py"})
    output: str = "results/gpu"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("measure", "predict"))


def main(config: MatrixConfig) -> dict[str, Any]:
    path = Path(config.output) / "matrix.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.mode == "measure":
        history_path = path.parent / "history.json.gz"
        if not history_path.exists():
            with gzip.open(history_path, "wt") as file:
                json.dump(record_history(row_config(config, HISTORY_ROW)), file)
        result = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "rows": []}
        there = [row["flags"] for row in result["rows"]]  # by a run that was interrupted
        for flags in [flags for flags in ROWS if flags not in there]:
            result["rows"].append({"flags": flags, "measured": measure_row(config, flags)})
            print(flags, result["rows"][-1]["measured"], flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    else:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            predicted = probe(row_config(config, row["flags"]))
            row["predicted"] = {name: predicted[name] for name in FIGURES}
            print(describe(row), flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return {"rows": len(result["rows"]), "output": config.output}


def row_config(config: MatrixConfig, flags: dict[str, Any]) -> ProbeConfig:
    """The steps alone: held-out answers are none of a row's figures."""
    fixed = {"model": config.model, "gpu": config.gpu, "mode": config.mode, "device": "cuda", "eval_samples": 0}
    return ProbeConfig(**(fixed | flags))


def measure_row(config: MatrixConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """What fails is told in its row: the others are not to be lost."""
    try:
        return measure(row_config(config, flags))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def describe(row: dict[str, Any]) -> str:
    measured, predicted = row["measured"], row["predicted"]
    if "failed" in measured or measured["oom"]:
        return f"{row['flags']}: {measured.get('failed') or measured['oom']}"
    errors = [f"{name} {predicted[name] / measured[name] - 1:+.3%}" for name in FIGURES]
    return f"{row['flags']}: {measured['peak_allocated_bytes'] / GIB:.3f} GiB, {', '.join(errors)}"


def record_history(config: ProbeConfig) -> dict[str, Any]:
    """What the allocator did in a run, in order: bytes and address of every block and segment."""
    return in_fresh_process(_record_history, config)


def _record_history(config: ProbeConfig) -> dict[str, Any]:
    torch.cuda.memory._record_memory_history(max_entries=2**21, context=None)
    measured = measure_this_process(config)
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    trace = [(event["action"], event["addr"], event["size"]) for event in events]
    return {"machine": machine(), "config": asdict(config), "measured": measured, "events": trace}


def machine() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    run_script(main, MatrixConfig)
