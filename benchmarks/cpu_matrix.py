"""How near memory predictions come on a CPU: results/cpu/matrix.json, docs/memory_accuracy.md.

    python -m benchmarks.cpu_matrix              # no GPU; adds the rows that are missing
    python -m benchmarks.cpu_matrix --overwrite  # all rows, an hour of two cores

A row is what `memory_probe.py --mode both --device cpu` predicts and measures; with a strategy it runs real DeepSpeed,
in processes joined by gloo. Models that are no preset get random weights.
"""

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GemmaConfig, LlamaConfig, PreTrainedConfig

from benchmarks.rows import Rows, RowsConfig
from benchmarks.tables import CPU_MATRIX, write_tables
from memory.config import ProbeConfig
from memory.probe import probe
from mgm.configuration_mgm import MGMConfig, tiny
from models.presets.mgm import processor_for
from utils import environment, run_script


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_VISION = {"images_per_sample": 0, "trainable_modules": []}  # a language model has no projector either
FULL = {"lora_r": 0}
FULL_NO_VISION = FULL | {"images_per_sample": 0, "trainable_modules": ["model", "lm_head"]}
EAGER, SGD = {"attn_implementation": "eager"}, {"optim": "sgd"}
NO_CHECKPOINTING, LOGITS = {"gradient_checkpointing": False}, {"loss": "full"}
MIXTURE = {"checkpoint_num_layers": 3, "checkpoint_num_mlps": 3}  # of 8 layers
ZERO3 = {"strategy": "zero3", "offload": "param"}


def rows_of(rows: int) -> dict[str, int]:
    return {"per_device_train_batch_size": rows}


def length(tokens: int) -> dict[str, int]:
    return {"max_seq_len": tokens}


# The defaults of a row: LoRA r=16, 128 tokens, a row with an image, fp32, sdpa, AdamW, checkpointing, chunked loss.
DEFAULTS = {"max_seq_len": 128, "mixed_precision": "no", "mode": "both", "device": "cpu", "eval_samples": 0}
ROWS: list[dict[str, Any]] = [
    # The tiny model: every flag once, and in bf16 the flags that matter there.
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
    *({"model": "mid"} | length(256) | MIXTURE | change for change in ({}, {"lora_target_modules": ALL_LINEAR})),
    *({"model": "mid", "images_per_sample": images} for images in (0, 2)),
    {"model": "mid"} | FULL | SGD,
    *(
        {"model": "mid-language"} | NO_VISION | change
        for change in ({}, NO_CHECKPOINTING, length(512), EAGER | LOGITS)
    ),
    {"model": "mid-language", "lora_target_modules": ALL_LINEAR} | NO_VISION | rows_of(2),
    *({"model": "mid-language"} | FULL_NO_VISION | change for change in ({}, SGD, NO_CHECKPOINTING)),
    # ZeRO-3 offloads to host memory, and a CPU has no other: these rows are device and host together.
    *({"model": "tiny"} | ZERO3 | change for change in ({}, FULL, NO_CHECKPOINTING, {"world_size": 2})),
    *({"model": "mid"} | ZERO3 | change for change in ({}, FULL)),
    {"model": "mid", "lora_target_modules": ALL_LINEAR} | ZERO3 | length(256) | MIXTURE,
]


def main(config: RowsConfig) -> dict[str, Any]:
    os.nice(5)
    about = {"cpu": platform.machine()} | environment("torch", "transformers", "peft", "accelerate", "deepspeed")
    rows = Rows(CPU_MATRIX, {"version": 1}, config.overwrite, machine=about)
    with tempfile.TemporaryDirectory() as folder:
        for flags in rows.missing(ROWS):
            rows.add({"flags": flags} | measure_row(flags, Path(folder)))
    write_tables()
    errors = [row["error"] for row in rows.result["rows"]]
    return {"rows": len(errors), "worst": max(errors, key=abs)}


def measure_row(flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes of tensors at the peak of a step, predicted and measured, once the optimizer's state exists."""
    config = ProbeConfig(**DEFAULTS | flags | {"model": model_path(flags["model"], folder)})
    both = probe(config)
    predicted, measured = both["predicted_peak_allocated_bytes"], both["measured_peak_allocated_bytes"]
    return {"predicted_bytes": predicted, "measured_bytes": measured, "error": both["error"]}


def model_path(name: str, folder: Path) -> str:
    """A preset's name, or the folder of one of MODELS, written here on first use."""
    if name not in MODELS:
        return name
    path = folder / name
    if not path.exists():
        model_config = MODELS[name]()
        auto_class = AutoModelForImageTextToText if isinstance(model_config, MGMConfig) else AutoModelForCausalLM
        torch.manual_seed(0)
        auto_class.from_config(model_config).save_pretrained(path)
        if isinstance(model_config, MGMConfig):
            processor_for(model_config).save_pretrained(path)
    return str(path)


def mid() -> MGMConfig:
    """MGM with 63 million parameters; its vision side is a few times as large as the tiny model's."""
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
    """A Llama with 63 million parameters, whose head and embedding are not tied."""
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


if __name__ == "__main__":
    run_script(main, RowsConfig)
