"""Predict and measure training steps on a CPU, row by row: results/cpu/matrix.json, docs/memory_accuracy.md.

    python -m benchmarks.cpu_matrix

Every row is memory_probe.py's `--mode both --device cpu`, or, with a strategy, real DeepSpeed in processes joined by
gloo. Rows that are there already are kept, so that an interrupted run goes on; `--overwrite` begins anew. Models that
are no preset are made for the run, with random weights.
"""

import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GemmaConfig, LlamaConfig, PreTrainedConfig

from benchmarks.tables import CPU_MATRIX, write_tables
from memory.config import ProbeConfig
from memory.probe import probe
from mgm.configuration_mgm import MGMConfig, tiny
from utils import run_script


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_VISION = {"images_per_sample": 0, "trainable_modules": []}  # a language model has no projector either
FULL = {"lora_r": 0}
FULL_NO_VISION = FULL | {"images_per_sample": 0, "trainable_modules": ["model", "lm_head"]}
EAGER, SGD = {"attn_implementation": "eager"}, {"optim": "sgd"}
NO_CHECKPOINTING, LOGITS = {"gradient_checkpointing": False}, {"loss": "full"}
ZERO3 = {"strategy": "zero3", "offload": "param"}


def rows_of(rows: int) -> dict[str, int]:
    return {"per_device_train_batch_size": rows}


def length(tokens: int) -> dict[str, int]:
    return {"max_seq_len": tokens}


# The defaults of a row: LoRA r=16, 128 tokens, a row with an image, fp32, sdpa, AdamW, checkpointing, chunked loss.
DEFAULTS = {"max_seq_len": 128, "mixed_precision": "no", "mode": "both", "device": "cpu", "eval_samples": 0}
ROWS: list[dict[str, Any]] = [
    # The tiny model: every flag once, in each precision what matters there.
    *({"model": "tiny", "lora_r": rank} for rank in (16, 8, 32, 0)),
    *({"model": "tiny"} | change for change in (LOGITS, NO_CHECKPOINTING, EAGER, SGD, rows_of(4), {"mlp_tiles": 1})),
    *({"model": "tiny"} | length(tokens) for tokens in (48, 512)),
    *({"model": "tiny", "images_per_sample": images} for images in (0, 3)),
    *({"model": "tiny", "gradient_accumulation_steps": 2} | change for change in ({}, FULL)),
    {"model": "tiny", "packing": True} | rows_of(2),
    {"model": "tiny", "lora_target_modules": ALL_LINEAR} | NO_CHECKPOINTING | LOGITS,
    {"model": "tiny"} | FULL | EAGER | NO_CHECKPOINTING | rows_of(2),
    *({"model": "tiny", "mixed_precision": "bf16"} | change for change in ({}, FULL, LOGITS, NO_CHECKPOINTING)),
    {"model": "tiny", "mixed_precision": "bf16"} | EAGER | rows_of(3),
    # Its language model alone.
    *({"model": "tiny-language"} | NO_VISION | change for change in ({}, NO_CHECKPOINTING, rows_of(4))),
    {"model": "tiny-language"} | FULL_NO_VISION | SGD,
    # Of middle size: Gemma and a small CLIP and ConvNeXt, Llama alone.
    *({"model": "mid", "lora_r": rank} for rank in (16, 8, 32, 0)),
    *({"model": "mid"} | change for change in (LOGITS, NO_CHECKPOINTING, EAGER, rows_of(2), {"mlp_tiles": 1})),
    *({"model": "mid"} | length(256) | change for change in ({}, NO_CHECKPOINTING | LOGITS)),
    *({"model": "mid", "images_per_sample": images} for images in (0, 2)),
    {"model": "mid"} | FULL | SGD,
    *(
        {"model": "mid-language"} | NO_VISION | change
        for change in ({}, NO_CHECKPOINTING, length(512), EAGER | LOGITS)
    ),
    {"model": "mid-language", "lora_target_modules": ALL_LINEAR} | NO_VISION | rows_of(2),
    *({"model": "mid-language"} | FULL_NO_VISION | change for change in ({}, SGD, NO_CHECKPOINTING)),
    # Device and host together: under ZeRO-3 everything that is not at work lies on the host, a CPU's only memory.
    *({"model": "tiny"} | ZERO3 | change for change in ({}, FULL, NO_CHECKPOINTING, {"world_size": 2})),
    *({"model": "mid"} | ZERO3 | change for change in ({}, FULL)),
]


@dataclass(kw_only=True)
class MatrixConfig:
    overwrite: bool = field(default=False, metadata={"help": "measure every row again"})

    def __post_init__(self) -> None:
        os.nice(5)


def main(config: MatrixConfig) -> dict[str, Any]:
    CPU_MATRIX.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rows": []}
    if CPU_MATRIX.exists() and not config.overwrite:
        result = json.loads(CPU_MATRIX.read_text())
    known = [row["flags"] for row in result["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        for flags in (flags for flags in ROWS if flags not in known):
            start = time.monotonic()
            result["rows"].append({"flags": flags} | measure_row(flags, Path(folder)))
            row = result["rows"][-1]
            print(f"{row['error']:+.3%} of {row['measured_bytes']:,}: {flags} ({time.monotonic() - start:.0f} s)")
            CPU_MATRIX.write_text(json.dumps(result, indent=1) + "\n")
    write_tables()
    return {"rows": len(result["rows"]), "worst": max((row["error"] for row in result["rows"]), key=abs)}


def measure_row(flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes of tensors at the peak, predicted and measured, in a process's steady state."""
    config = ProbeConfig(**DEFAULTS | flags | {"model": model_path(flags["model"], folder)})
    both = probe(config)
    predicted, measured = both["predicted_peak_allocated_bytes"], both["measured_peak_allocated_bytes"]
    return {"predicted_bytes": predicted, "measured_bytes": measured, "error": both["error"]}


def model_path(name: str, folder: Path) -> str:
    """A preset's name as it is; else the folder of a model with random weights, made on first use."""
    if name not in MODELS:
        return name
    path = folder / name
    if not path.exists():
        model_config = MODELS[name]()
        auto_class = AutoModelForImageTextToText if isinstance(model_config, MGMConfig) else AutoModelForCausalLM
        torch.manual_seed(0)
        auto_class.from_config(model_config).save_pretrained(path)
    return str(path)


def mid() -> MGMConfig:
    """MGM of 63 million parameters, with the tiny model's vision side a few times larger."""
    config = tiny()
    config.text_config = GemmaConfig(
        vocab_size=16000,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=128,
    )
    config.image_token_id = 16000
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 256, 1024
    config.vision_config_aux.hidden_sizes, config.vision_config_aux.depths = [32, 64, 128, 256], [2, 2, 4, 2]
    return config


def mid_language() -> PreTrainedConfig:
    """A Llama of 63 million parameters, its head beside its embedding."""
    return LlamaConfig(
        vocab_size=16000,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=9,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=2048,
    )


MODELS = {"tiny-language": lambda: tiny().text_config, "mid": mid, "mid-language": mid_language}


def machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed")
    return {"cpu": platform.machine(), "python": platform.python_version()} | {
        name: version(name) for name in packages
    }


if __name__ == "__main__":
    run_script(main, MatrixConfig)
