"""Predict what MGM-2B takes of a GPU and of the host, for the tables in docs/: `python -m benchmarks.mgm_2b`.

Needs no GPU. Writes results/mgm_2b.json; `python -m benchmarks.tables` writes the tables from it. Rows that are there
already are kept, so that an interrupted run goes on; `--overwrite` begins anew.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import step
from memory.config import ProbeConfig
from memory.host import host_breakdown
from memory.predict import trace_step
from memory.probe import probe
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
    "host": [
        {"config_file": "accelerate_configs/zero3.yaml"},
        {"config_file": "accelerate_configs/zero3.yaml", "world_size": 2},
        {"config_file": "accelerate_configs/zero3.yaml", "lora_r": 0},
        {"config_file": "accelerate_configs/zero2.yaml"},
        {"config_file": "accelerate_configs/single.yaml"},
    ],
}


@dataclass(kw_only=True)
class DocumentConfig:
    output: str = "results/mgm_2b.json"
    overwrite: bool = False


def main(config: DocumentConfig) -> dict[str, Any]:
    path = Path(config.output)
    result = {name: [] for name in ROWS}
    if path.exists() and not config.overwrite:
        result = json.loads(path.read_text())
    for name, predict_row in (("lora", lora), ("host", host)):
        there = [row["flags"] for row in result[name]]
        for flags in [flags for flags in ROWS[name] if flags not in there]:
            result[name].append({"flags": flags} | predict_row(flags))
            print(result[name][-1], flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    return {"rows": sum(map(len, result.values())), "output": config.output}


def probe_config(flags: dict[str, Any]) -> ProbeConfig:
    """bf16, a row of 2048 tokens with an image, checkpointing: ProbeConfig's defaults."""
    return ProbeConfig(mode="predict", device="cuda", gpu="rtx4090", eval_samples=0, **flags)


def lora(flags: dict[str, Any]) -> dict[str, int]:
    """What is trained, and the GPU's memory."""
    with torch.device("meta"):
        model = step.build_model(probe_config(flags), is_deepspeed=False)
    total, trainable = count_parameters(model)
    result = probe(probe_config(flags))
    sizes = {name: result[name] for name in ("peak_allocated_bytes", "device_bytes")}
    return {"total_params": total, "trainable_params": trainable} | sizes


def host(flags: dict[str, Any]) -> dict[str, Any]:
    """The host's memory by purpose while the steps run."""
    config = probe_config(flags)
    trace = trace_step(config)
    return {"host": host_breakdown(trace, config.dataloader_num_workers, config.world_size)}


if __name__ == "__main__":
    run_script(main, DocumentConfig)
