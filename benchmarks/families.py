"""How near memory predictions come for other families than MGM, on a CPU: results/families.json.

    python -m benchmarks.families              # no GPU; adds the rows that are missing
    python -m benchmarks.families --overwrite  # all rows, an hour of one core

A row is what `memory_probe.py --mode both --device cpu` predicts and measures, in processes of their own, for a tiny
model of the family: its real classes and its own processor, random weights. What needs a package that is not installed
is left out.
"""

import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import Rows, RowsConfig
from benchmarks.tables import FAMILIES_MATRIX, write_tables
from memory.config import ProbeConfig
from memory.launch import in_fresh_process
from memory.measure_cpu import measure_cpu
from memory.predict import predict
from tests.tiny_families import FAMILIES, TEXT_FAMILIES, TIMM_FAMILIES, TORCHVISION_FAMILIES, write_family
from utils import environment, run_script


# The defaults of a row: LoRA r=8, a row of 256 tokens with an image, fp32, sdpa, AdamW, checkpointing, chunked loss.
DEFAULTS = {
    "max_seq_len": 256,
    "image_size": "100x80",
    "lora_r": 8,
    "mixed_precision": "no",
    "mode": "predict",
    "device": "cpu",
    "eval_samples": 0,
}
# What a family needs besides: attention that caps its scores, LoRA on layers with other names.
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"lora_target_modules": ["q_b_proj", "kv_b_proj", "o_proj"]},
    "gemma2": {"attn_implementation": "eager"},
    "gpt2": {"lora_r": 0},  # its layers are no linear layers
    "gpt_oss": {"attn_implementation": "eager"},
    "kimi_k25": {"lora_target_modules": ["q_b_proj", "kv_b_proj", "o_proj"]},
    "lfm2_vl": {"lora_target_modules": ["q_proj", "v_proj", "out_proj"]},
    "mamba2": {"lora_target_modules": ["in_proj"], "attn_implementation": "eager"},
    "paligemma2": {"attn_implementation": "eager"},
    "phi3": {"lora_target_modules": ["qkv_proj", "o_proj"]},
}
LORA, FULL = {}, {"lora_r": 0}
FOR_IMAGES = [
    LORA,
    FULL,
    {"attn_implementation": "eager"},
    {"images_per_sample": 2},
    {"per_device_train_batch_size": 2},
    {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": False, "loss": "full"},
    {"eval_samples": 1, "per_device_eval_batch_size": 6},  # the peak is where it answers
]
FOR_TEXT = [LORA, FULL]
# In bf16 a CPU is slow, and in 4 bits too: a few families.
FOR_FEW = [{"mixed_precision": "bf16"}, {"quantize": "nf4"}, {"lora_target_modules": ["all-linear"]}]
FEW = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "smolvlm", "internvl", "mistral3", "llama")


# In processes of DeepSpeed and DDP; a CPU has one memory for device and host.
IN_PARALLEL = [
    *({"family": family, "strategy": "zero3", "offload": "param"} for family in ("qwen3_vl", "gemma3", "smolvlm")),
    {"family": "qwen3_5", "strategy": "zero3", "offload": "param", "world_size": 2},
    {"family": "llava", "strategy": "zero2", "world_size": 2},
    {"family": "mistral3", "strategy": "zero2", "offload": "optimizer", "lora_r": 0},
    {"family": "internvl", "strategy": "ddp", "world_size": 2},
    {"family": "mixtral", "strategy": "zero3", "world_size": 2},
]


def rows() -> Iterator[dict[str, Any]]:
    for family in FAMILIES:
        kinds = FOR_TEXT if family in TEXT_FAMILIES else FOR_IMAGES
        for flags in [*kinds, *(FOR_FEW if family in FEW else [])]:
            if is_installed(family) and not any(NEEDS.get(family, {}).get(name) == flags[name] for name in flags):
                yield {"family": family} | flags
    yield from IN_PARALLEL


def is_installed(family: str) -> bool:
    """Whether the packages that the family needs are installed."""
    needed = {"timm": TIMM_FAMILIES, "torchvision": TORCHVISION_FAMILIES}
    return all(importlib.util.find_spec(package) for package, families in needed.items() if family in families)


def main(config: RowsConfig) -> dict[str, Any]:
    os.nice(5)
    about = {"cpu": platform.machine()} | environment("torch", "transformers", "peft", "accelerate")
    found = Rows(FAMILIES_MATRIX, {"version": 1}, config.overwrite, machine=about)
    with tempfile.TemporaryDirectory() as folder:
        for flags in found.missing(rows()):
            found.add({"flags": flags} | measure_row(flags, Path(folder)))
    write_tables()
    errors = [row["error"] for row in found.result["rows"]]
    return {"rows": len(errors), "worst": max(errors, key=abs)}


def measure_row(flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes of tensors at the peak of a run, predicted and measured, each in a process of its own."""
    config = row_config(flags, folder)
    predicted = in_fresh_process(predict, config, method="forkserver", preload=measure_cpu.__module__)
    predicted_bytes, measured_bytes = predicted["peak_allocated_bytes"], measure_cpu(config, config.launch)
    error = predicted_bytes / measured_bytes - 1
    return {"predicted_bytes": predicted_bytes, "measured_bytes": measured_bytes, "error": error}


def row_config(flags: dict[str, Any], folder: Path) -> ProbeConfig:
    """The row's flags for the family's model, which is written below `folder` on first use."""
    flags = dict(flags)
    family = flags.pop("family")
    path = folder / family
    if not path.exists():
        write_family(family, path, with_weights=True)
    images = {"images_per_sample": 0} if family in TEXT_FAMILIES else {}
    return ProbeConfig(**DEFAULTS | images | NEEDS.get(family, {}) | flags | {"model": str(path)})


if __name__ == "__main__":
    run_script(main, RowsConfig)
