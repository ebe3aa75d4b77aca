"""How much memory each technique saves MGM-2B, and how many operations it adds, predicted.

    python -m benchmarks.ladder    # no GPU; 18 rows, each 10 to 80 seconds

The first row is full fine-tuning with logits. Then techniques are added one after another, each is used alone, and
each is left out of all. Operations are counted by torch's own formulas. Writes results/ladder.json,
docs/pictures/ladder.svg, and the table of docs/memory.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import step
from benchmarks.operations import Operations
from benchmarks.pictures import write_pictures
from benchmarks.rows import RESULTS, machine
from benchmarks.tables import write_tables
from memory.config import ProbeConfig
from memory.predict import summarize, trace_step
from mgm.patch_info_mining import MGMPatchInfoMining, View
from utils import flag, run_script, write_json


# The first row, and what each technique changes. `mining` is no flag: it patches the original's computation in.
START = {
    "lora_r": 0, "loss": "full", "gradient_checkpointing": False, "mlp_tiles": 1, "mining": "original",
}  # fmt: skip
TECHNIQUES: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA r=16": {"lora_r": 16},
    "no logits": {"loss": "chunked"},
    "mining from the query's side": {"mining": "query"},
    "MLP in tiles": {"mlp_tiles": 4},
}
BRANCHES = {  # from the last rung on
    "4-bit weights": {"quantize": "nf4"},
    "ZeRO-3, all offloaded": {"config_file": "accelerate_configs/zero3.yaml"},
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes")


@dataclass(kw_only=True)
class LadderConfig:
    model: str = flag("mgm-2b", "preset name")
    max_seq_len: int = 2048


def main(config: LadderConfig) -> dict[str, Any]:
    rungs, flags = [{"title": "full fine-tuning, with logits", "flags": dict(START)}], dict(START)
    for title, change in TECHNIQUES.items():
        flags = flags | change
        rungs.append({"title": title, "flags": flags})
    branches = [{"title": title, "flags": flags | change} for title, change in BRANCHES.items()]
    alone = [{"title": title, "flags": START | change} for title, change in TECHNIQUES.items()]
    without = [
        {"title": title, "flags": flags | {name: START[name] for name in change}}
        for title, change in TECHNIQUES.items()
    ]
    for row in (*rungs, *branches, *alone, *without):
        row |= predict_row(config, row["flags"])
        print(row, flush=True)
    result = {"model": config.model, "max_seq_len": config.max_seq_len} | machine(*PACKAGES)
    result |= {"rungs": rungs, "branches": branches, "alone": alone, "without": without}
    write_json(RESULTS / "ladder.json", result)
    write_tables()
    write_pictures(["ladder"])
    return {"rungs": len(rungs), "output": "results/ladder.json"}


def predict_row(config: LadderConfig, flags: dict[str, Any]) -> dict[str, Any]:
    flags = dict(flags)
    is_original = flags.pop("mining") == "original"
    flags |= {"max_seq_len": config.max_seq_len, "eval_samples": 0}
    probe_config = ProbeConfig(model=config.model, mode="predict", **flags)
    with patch.object(MGMPatchInfoMining, "forward", original_mining) if is_original else nullcontext():
        with counted_operations() as flops:
            record = trace_step(probe_config)
    result = summarize(record, probe_config)
    names = ("peak_allocated_bytes", "device_bytes", "host_bytes", "breakdown")
    # Under ZeRO the step is traced in another process, and torch has no formula for 4-bit layers.
    return {name: result[name] for name in names} | {"flops": flops[-1] if flops and "quantize" not in flags else None}


@contextmanager
def counted_operations() -> Iterator[list[int]]:
    """The floating-point operations of each call of step.training_step."""
    original, counts = step.training_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            result = original(*args, **kwargs)
        counts.append(operations.total)
        return result

    with patch.object(step, "training_step", counted):
        yield counts


def original_mining(
    self: MGMPatchInfoMining, features: torch.Tensor, stages_aux: list[torch.Tensor], *_: Any
) -> torch.Tensor:
    """The original's patch info mining: it keeps a key and a value of each fine position for the backward pass.

    For models without crops.
    """
    grid = round(features.shape[1] ** 0.5)
    squares = View(0, 1, False, grid).squares(stages_aux, slice(0, grid))  # [N, P, S, C_aux]
    key, value = (norm_and_project(projection, squares) for projection in (self.key_proj, self.value_proj))
    query = self.query_proj(features).unsqueeze(2)  # [N, P, 1, C]
    weights = (query @ (key / key.shape[-1] ** 0.5).transpose(2, 3)).softmax(dim=-1)
    return features + (weights @ value).squeeze(2)


def norm_and_project(projection: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    norm, linear = projection
    normed = F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.linear(normed, linear.weight, linear.bias)


if __name__ == "__main__":
    run_script(main, LadderConfig)
