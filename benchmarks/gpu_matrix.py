"""How near memory predictions come on a GPU: results/gpu/matrix.json and families.json, docs/memory.md.

    python -m benchmarks.gpu_matrix --mode measure    # needs a GPU of 80 GB; adds the rows that are missing
    python -m benchmarks.gpu_matrix --mode predict    # needs no GPU; predicts all rows, each 10 to 80 seconds
    python -m benchmarks.gpu_matrix --families true --mode measure    # other families' models, at their real size

A row that runs out of memory is a result too. Measuring also writes what PyTorch's allocator did in one run, to
history.json.gz, for tests/test_allocator.py.
"""

import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Rows, RowsConfig, gpu_machine, gpu_of, or_failure
from benchmarks.tables import write_tables
from memory.config import ProbeConfig
from memory.launch import in_fresh_process
from memory.measure import measure
from memory.measure_gpu import measure_this_process
from memory.probe import probe
from utils import check_choice, flag, run_script, write_json


ZERO2, ZERO3 = ({"config_file": f"accelerate_configs/{name}.yaml"} for name in ("zero2", "zero3"))
ROWS = [
    *({"lora_r": rank, "max_seq_len": length} for length in (2048, 1024) for rank in (16, 8, 32, 0)),
    ZERO3,
    {"budget_gib": 7.78},  # the defaults on an 8 GB card
    {"lora_r": 0, "loss": "full", "budget_gib": 23.63},  # full fine-tuning with logits on a 24 GB card
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
FAMILIES = ("qwen3-vl-2b", "qwen3.5-2b", "gemma-3-4b", "gemma-4-e2b", "ministral-3-3b", "smolvlm2-2.2b")
FAMILY_ROWS = [
    *({"model": name} for name in FAMILIES),
    *({"model": name, "lora_target_modules": ["all-linear"], "images_per_sample": 2} for name in FAMILIES[:-1]),
    *({"model": name, "gradient_checkpointing": False, "max_seq_len": 1024} for name in FAMILIES[:-1]),
    {"model": "smolvlm2-2.2b", "lora_target_modules": ["all-linear"]},  # an image takes 1084 positions
    {"model": "smolvlm2-2.2b", "gradient_checkpointing": False},
    {"model": "qwen3-vl-2b", "image_size": "1280x960"},
    {"model": "qwen2.5-vl-3b"},
    {"model": "paligemma2-3b"},
    {"model": "internvl3.5-2b", "max_seq_len": 4096},  # an image takes 3330
]
HISTORY_ROW = {"max_seq_len": 1024}
PREDICTED = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "host_bytes")


@dataclass(kw_only=True)
class MatrixConfig(RowsConfig):
    mode: str = flag("predict", "measure | predict")
    model: str = "mgm-2b"
    families: bool = flag(False, "the models of other families instead")
    output: str = "results/gpu"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("measure", "predict"))


def main(config: MatrixConfig) -> dict[str, Any]:
    path = Path(config.output) / ("families.json" if config.families else "matrix.json")
    result = measure_rows(config, path) if config.mode == "measure" else predict_rows(config, path)
    return {"rows": len(result["rows"]), "output": config.output}


def measure_rows(config: MatrixConfig, path: Path) -> dict[str, Any]:
    rows = Rows(path, {"version": 1}, config.overwrite, machine=gpu_machine())
    gpu = gpu_of(rows.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    history_path = path.parent / "history.json.gz"
    if not history_path.exists() and not config.families:
        with gzip.open(history_path, "wt") as file:
            json.dump(in_fresh_process(record_history, row_config(config, gpu, HISTORY_ROW)), file)
    for flags in rows.missing(FAMILY_ROWS if config.families else ROWS):
        rows.add({"flags": flags, "measured": measure_row(row_config(config, gpu, flags))})
    return rows.result


def predict_rows(config: MatrixConfig, path: Path) -> dict[str, Any]:
    """Predict all rows anew: the code may have changed since."""
    result = json.loads(path.read_text())
    gpu = gpu_of(result)
    for row in result["rows"]:
        predicted = probe(row_config(config, gpu, row["flags"]))
        row["predicted"] = {name: predicted[name] for name in PREDICTED}
        print(row, flush=True)
    write_json(path, result)
    write_tables()
    return result


def row_config(config: MatrixConfig, gpu: str, flags: dict[str, Any]) -> ProbeConfig:
    """Of training steps alone, without held-out answers."""
    fixed = {"model": config.model, "gpu": gpu, "mode": config.mode, "device": "cuda", "eval_samples": 0}
    return ProbeConfig(**(fixed | flags))


def measure_row(config: ProbeConfig) -> dict[str, Any]:
    return or_failure(measure, config)


def record_history(config: ProbeConfig) -> dict[str, Any]:
    """Every allocation and free of a run, in order, with its address and bytes. For a process of its own."""
    torch.cuda.memory._record_memory_history(max_entries=2**21, context=None)
    measured = measure_this_process(config)
    events = [
        (event["action"], event["addr"], event["size"]) for event in torch.cuda.memory._snapshot()["device_traces"][0]
    ]
    return {"machine": gpu_machine(), "config": asdict(config), "measured": measured, "events": events}


if __name__ == "__main__":
    run_script(main, MatrixConfig)
