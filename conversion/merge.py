"""Merge a LoRA adapter into the model that it was trained on, of any family, and save the result.

    python -m conversion.merge --adapter outputs/mine --output merged

The new folder holds the model, which loads without PEFT, and the processor. The whole model is in memory, in the dtype
of its weights. The last line on stdout is a JSON object.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quiet  # noqa: F401 (before PEFT)

import torch

from conversion.merge_adapter import merge_adapter
from conversion.shards import new_folder
from models.adapter import base_of, check_base, load_trained_processor
from models.config import find_tiny_mgm
from models.loading import load_config, load_model
from utils import UserError, flag, run_script


@dataclass(kw_only=True)
class MergeConfig:
    adapter: str | None = flag(None, "folder of the adapter")
    model: str | None = flag(None, "the model that it was trained on; default: as the adapter says")
    output: str | None = flag(None, "new folder to write")

    def __post_init__(self) -> None:
        for name in ("adapter", "output"):
            if getattr(self, name) is None:
                raise UserError(f"give --{name} DIR")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")


def main(config: MergeConfig) -> dict[str, Any]:
    base = find_tiny_mgm(base_of(config.adapter))
    if config.model is not None:
        check_base(config.adapter, config.model)
        base = config.model
    model = load_model(base, stored_dtype(base), "sdpa")
    merge_adapter(model, Path(config.adapter))  # in place
    with new_folder(Path(config.output)) as partial:
        model.save_pretrained(partial)
        load_trained_processor(base, config.adapter).save_pretrained(partial)
    return {"status": "done", "output": config.output, "model": base}


def stored_dtype(model: str) -> torch.dtype:
    """The dtype that the model's config names, else fp32."""
    config = load_config(model)
    return config.dtype or config.get_text_config().dtype or torch.float32


if __name__ == "__main__":
    run_script(main, MergeConfig)
