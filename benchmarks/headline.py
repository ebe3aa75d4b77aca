"""Predict MGM-2B for the README: rank x length x strategy, against cards of 8 to 24 GB, beside other estimators.

    python -m benchmarks.headline

Writes results/headline.json and the README's table. Rows predicted by the code as it is are kept, so that an
interrupted run goes on; when any of this repository's files that a prediction uses has changed, all are made anew.
"""

import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from torch import nn

from benchmarks.tables import HEADLINE, HEADLINE_CARDS, ROOT, write_tables
from memory.config import ProbeConfig
from memory.predict import device_memory, summarize, trace_step
from models.loading import load_model
from utils import run_script


RANKS, LENGTHS = (8, 16, 32, 0), (1024, 2048)
STRATEGIES = {  # of one process; ZeRO as accelerate_configs has it
    "single": {},
    "zero2": {"config_file": "accelerate_configs/zero2.yaml"},
    "zero3 + offload": {"config_file": "accelerate_configs/zero3.yaml"},
}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed")


@dataclass(kw_only=True)
class HeadlineConfig:
    model: str = field(default="mgm-2b", metadata={"help": "preset name"})

    def __post_init__(self) -> None:
        os.nice(5)


def main(config: HeadlineConfig) -> dict[str, Any]:
    fresh = {"model": config.model, "code": fingerprint(), "estimates": estimates(config.model), "rows": []}
    result = json.loads(HEADLINE.read_text()) if HEADLINE.exists() else fresh
    if any(result[key] != fresh[key] for key in ("model", "code", "estimates")):
        result = fresh
    known = [row["flags"] for row in result["rows"]]
    for length, rank, strategy in itertools.product(LENGTHS, RANKS, STRATEGIES):
        flags = {"lora_r": rank, "max_seq_len": length, "strategy": strategy}
        if flags not in known:
            result["rows"].append({"flags": flags} | predict_row(config.model, flags))
            print(flags, result["rows"][-1]["peak_allocated_bytes"], flush=True)
            HEADLINE.write_text(json.dumps(result, indent=1) + "\n")
    write_tables()
    return {"rows": len(result["rows"]), "output": str(HEADLINE.relative_to(ROOT))}


def predict_row(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One trace serves all cards: of the cards in the table none has Hopper's larger cuBLAS workspaces."""
    step = {"lora_r": flags["lora_r"], "max_seq_len": flags["max_seq_len"]} | STRATEGIES[flags["strategy"]]
    config = ProbeConfig(model=model, mode="predict", eval_samples=0, **step)
    trace = trace_step(config)
    whole = summarize(trace, config)
    device = {gpu: device_memory(trace.device, replace(config, gpu=gpu))["device_bytes"] for gpu in HEADLINE_CARDS}
    return {key: whole[key] for key in ("peak_allocated_bytes", "host_bytes", "breakdown")} | {"device_bytes": device}


def estimates(model: str) -> dict[str, int]:
    """What accelerate's and DeepSpeed's estimators say of a GPU's memory, in bytes. They are given a model: neither
    length, images, LoRA nor checkpointing is asked for."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    with torch.device("meta"):
        module = load_model(model, torch.float32, "sdpa")  # accelerate takes the sizes as those of fp32
    total_bytes, _ = calculate_maximum_sizes(module)
    usage = estimate_training_usage(total_bytes, "bfloat16")
    # DeepSpeed's *_all_live would take all parameters of a meta model for one: they have no addresses.
    total = sum(parameter.numel() for parameter in module.parameters())
    _, zero2, *_ = estimate_zero2_model_states_mem_needs(total, cpu_offload=False)
    _, zero3, *_ = estimate_zero3_model_states_mem_needs(total, largest_layer(module))
    return {"accelerate": int(max(usage.values())), "zero2": zero2, "zero3 + offload": zero3}


def largest_layer(module: nn.Module) -> int:
    """Parameters of the module that has most of its own, as DeepSpeed counts them."""
    return max(sum(parameter.numel() for parameter in part.parameters(recurse=False)) for part in module.modules())


def fingerprint() -> str:
    """Of the repository's files that are loaded now, the launch configs, and the libraries' versions."""
    digest = hashlib.sha256(" ".join(version(library) for library in LIBRARIES).encode())
    for path in sorted(loaded_files() | set((ROOT / "accelerate_configs").iterdir())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def loaded_files() -> set[Path]:
    """The files of all modules that are imported now and are this repository's, in whatever folder."""
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name) for name in names if name}
    # A virtual environment may lie in the repository's root.
    return {path for path in files if path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix)}


if __name__ == "__main__":
    run_script(main, HeadlineConfig)
