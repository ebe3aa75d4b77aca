"""Which cards of 8 to 24 GB MGM-2B fits, by rank, length and strategy, beside other libraries' estimates.

    python -m benchmarks.headline               # no GPU; adds the rows that are missing
    python -m benchmarks.headline --overwrite   # all rows, 16 minutes of one core: when the prediction has changed

Writes results/headline.json, and the tables of README.md and docs/memory.md.
"""

import itertools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes

from benchmarks.rows import ROOT, Rows, RowsConfig
from benchmarks.tables import HEADLINE, HEADLINE_CARDS, STRATEGIES, write_tables
from memory.config import ProbeConfig
from memory.predict import device_memory, summarize, trace_step
from models.loading import load_model
from utils import flag, run_script


RANKS, LENGTHS = (8, 16, 32, 0), (1024, 2048)


@dataclass(kw_only=True)
class HeadlineConfig(RowsConfig):
    model: str = flag("mgm-2b", "preset name")


def main(config: HeadlineConfig) -> dict[str, Any]:
    os.nice(5)
    rows = Rows(HEADLINE, {"model": config.model, "version": 1}, config.overwrite)
    rows.result["estimates"] = estimates(config.model)
    wanted = [
        {"lora_r": rank, "max_seq_len": length, "strategy": strategy}
        for length, rank, strategy in itertools.product(LENGTHS, RANKS, STRATEGIES)
    ]
    for flags in rows.missing(wanted):
        rows.add({"flags": flags} | predict_row(config.model, flags))
    rows.write()
    write_tables()
    return {"rows": len(rows.result["rows"]), "output": str(HEADLINE.relative_to(ROOT))}


def predict_row(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One trace serves all cards: cuBLAS needs as large a workspace on each of them (Hopper's is larger)."""
    step = {"lora_r": flags["lora_r"], "max_seq_len": flags["max_seq_len"]} | STRATEGIES[flags["strategy"]]
    config = ProbeConfig(model=model, mode="predict", eval_samples=0, **step)
    record = trace_step(config)
    result = summarize(record, config)
    device = {gpu: device_memory(record.device, replace(config, gpu=gpu))["device_bytes"] for gpu in HEADLINE_CARDS}
    return {key: result[key] for key in ("peak_allocated_bytes", "host_bytes", "breakdown")} | {"device_bytes": device}


def estimates(model: str) -> dict[str, int]:
    """accelerate's and DeepSpeed's own estimates of a GPU's memory, in bytes. They know the model's size alone:
    neither length nor images, LoRA or checkpointing."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    with torch.device("meta"):
        module = load_model(model, torch.float32, "sdpa")  # accelerate expects sizes in fp32
    total_bytes, _ = calculate_maximum_sizes(module)
    usage = estimate_training_usage(total_bytes, "bfloat16")
    # Not DeepSpeed's *_all_live: it tells parameters apart by their addresses, and on meta they have none.
    total = sum(parameter.numel() for parameter in module.parameters())
    _, zero2, *_ = estimate_zero2_model_states_mem_needs(total, cpu_offload=False)
    # The most parameters that one module holds itself: DeepSpeed counts its largest layer so.
    largest = max(sum(parameter.numel() for parameter in part.parameters(recurse=False)) for part in module.modules())
    _, zero3, *_ = estimate_zero3_model_states_mem_needs(total, largest)
    return {"accelerate": int(max(usage.values())), "zero2": zero2, "zero3 + offload": zero3}


if __name__ == "__main__":
    run_script(main, HeadlineConfig)
