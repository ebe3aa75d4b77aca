"""MGM-2B's parameters by part, its trained parameters and GPU memory by way of training, its memory and time by what
is checkpointed, and its host memory by launch config, predicted.

    python -m benchmarks.mgm_2b    # no GPU; adds the rows that are missing, each 10 to 80 seconds

Writes results/mgm_2b.json, the tables of docs/lora.md, docs/memory.md and docs/host_memory.md, and
docs/pictures/architecture.svg.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import step
from benchmarks.pictures import write_pictures
from benchmarks.rows import Rows, RowsConfig
from benchmarks.tables import write_tables
from memory.config import ProbeConfig
from memory.host import host_breakdown
from memory.predict import trace_step
from memory.probe import probe
from models.loading import load_model
from models.lora import count_parameters
from utils import run_script


ROWS = {
    "lora": [
        {"lora_r": 8, "lora_alpha": 16},
        {"lora_r": 16, "lora_alpha": 32},
        {"lora_r": 32, "lora_alpha": 64},
        {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["all-linear"]},
        {"lora_r": 0, "trainable_modules": ["multi_modal_projector", "patch_info_mining"]},
        {"lora_r": 0},
    ],
    "checkpointed": [
        {"checkpoint_num_layers": 18, "checkpoint_num_mlps": 0},
        {"checkpoint_num_layers": 9, "checkpoint_num_mlps": 9},
        {"checkpoint_num_layers": 0, "checkpoint_num_mlps": 18},
        {"checkpoint_num_layers": 9, "checkpoint_num_mlps": 0},
        {"checkpoint_num_layers": 0, "checkpoint_num_mlps": 9},
        {"checkpoint_num_layers": 0, "checkpoint_num_mlps": 0},
        {"gradient_checkpointing": False},
    ],
    "host": [
        {"config_file": "accelerate_configs/zero3.yaml"},
        {"config_file": "accelerate_configs/zero3.yaml", "world_size": 2},
        {"config_file": "accelerate_configs/zero3.yaml", "lora_r": 0},
        {"config_file": "accelerate_configs/zero2.yaml"},
        {"config_file": "accelerate_configs/single.yaml"},
    ],
}


@dataclass(kw_only=True)
class Mgm2bConfig(RowsConfig):
    output: str = "results/mgm_2b.json"


def main(config: Mgm2bConfig) -> dict[str, Any]:
    rows = Rows(Path(config.output), {"version": 1}, config.overwrite)
    for name, predict_row in PREDICTED.items():
        for flags in rows.missing(ROWS[name], name):
            rows.add({"flags": flags} | predict_row(flags), name)
    rows.result["parts"] = parts()
    rows.write()
    write_tables()
    write_pictures(["architecture"])
    return {"rows": sum(len(rows.result[name]) for name in ROWS), "output": config.output}


def probe_config(flags: dict[str, Any]) -> ProbeConfig:
    """bf16, a row of 2048 tokens with an image, checkpointing: ProbeConfig's defaults."""
    return ProbeConfig(mode="predict", device="cuda", gpu="rtx4090", eval_samples=0, **flags)


def parts() -> dict[str, int]:
    """The parameters of each part, by its name in mgm/modeling_mgm.py. The head is the language model's embedding."""
    with torch.device("meta"):
        model = load_model(ProbeConfig.model, torch.bfloat16, "sdpa")
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.model.named_children()}


def lora(flags: dict[str, Any]) -> dict[str, int]:
    """Parameters in all and trained, and the GPU's memory in bytes."""
    config = probe_config(flags)
    with torch.device("meta"):
        total, trainable = count_parameters(step.build_model(config, is_deepspeed=False))
    result = probe(config)
    sizes = {name: result[name] for name in ("peak_allocated_bytes", "device_bytes")}
    return {"total_params": total, "trainable_params": trainable} | sizes


def checkpointed(flags: dict[str, Any]) -> dict[str, float]:
    """The GPU's memory in bytes, and an update's seconds."""
    result = probe(probe_config(flags))
    return {name: result[name] for name in ("peak_allocated_bytes", "device_bytes", "step_seconds")}


def host(flags: dict[str, Any]) -> dict[str, Any]:
    """The host's memory in bytes, by purpose, while the steps run."""
    config = probe_config(flags)
    record = trace_step(config)
    return {"host": host_breakdown(record, config.dataloader_num_workers, config.world_size)}


PREDICTED = {"lora": lora, "checkpointed": checkpointed, "host": host}


if __name__ == "__main__":
    run_script(main, Mgm2bConfig)
