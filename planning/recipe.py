"""The chosen step as a recipe for train.py, and the command that runs it."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from models.loading import is_preset
from planning.config import DEFAULTS, SEARCHED, PlanConfig
from planning.predictions import Prediction
from step import StepConfig
from utils import counted, flag_words


FIRST = ("model", "dataset", "image_folder")


def recipe_text(config: PlanConfig, chosen: Prediction, recipe: Path) -> str:
    """All flags of the step, so that no default can come between; first those that the plan has found."""
    flags = {each.name: getattr(chosen.config, each.name) for each in fields(StepConfig)}
    flags |= {"dataset": config.dataset, "image_folder": config.image_folder}
    found = [name for name in SEARCHED if name in flags]
    groups = (FIRST, found, [name for name in flags if name not in (*FIRST, *found)])
    comments = ("", "# What the plan has found:", "# As you gave it, or by default:")
    lines = [
        f"# Planned for {config.card.title}: rows of {chosen.config.max_seq_len} tokens with "
        f"{counted(chosen.config.images_per_sample, 'image')} of {chosen.config.image_size}.",
        f"#   {launch_command(config, chosen, recipe)}",
    ]
    if is_preset(config.model):
        lines.append(f"# {config.model} is a preset, sizes without weights: name the folder or hub id of the model.")
    for comment, names in zip(comments, groups, strict=True):
        values = {name: flags[name] for name in names if flags[name] is not None}
        if values:
            lines += ["", *([comment] if comment else []), yaml.safe_dump(values, sort_keys=False).rstrip()]
    return "\n".join(lines) + "\n"


def launch_command(config: PlanConfig, chosen: Prediction, recipe: Path | None) -> str:
    """The command that trains with the chosen step; without a recipe, with the flags that the plan has found."""
    strategy = chosen.config.launch
    words = ["--config_file", config.launch_file(strategy)]
    if config.config_file is not None or strategy.world_size > 1:  # one's own file may say another number
        words += ["--num_processes", str(strategy.world_size)]
    flags = ["--recipe", str(recipe)] if recipe is not None else flag_words(found_flags(config, chosen))
    return shlex.join(["accelerate", "launch", *words, "train.py", *flags])


def found_flags(config: PlanConfig, chosen: Prediction) -> dict[str, Any]:
    """The step's flags that differ from train.py's defaults; and those of which its demo, which it trains without
    --dataset, has defaults of its own."""
    flags = {"model": config.model, "dataset": config.dataset, "image_folder": config.image_folder}
    for each in fields(StepConfig):
        value = getattr(chosen.config, each.name)
        if value != DEFAULTS[each.name] or each.name in (*SEARCHED, "per_device_eval_batch_size"):
            flags.setdefault(each.name, value)
    return flags
