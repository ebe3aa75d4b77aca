"""The chosen step as a recipe for train.py, and the command that runs it."""

from dataclasses import fields
from pathlib import Path

import yaml

from models.loading import is_preset
from planning.config import SEARCHED, PlanConfig
from planning.predictions import Prediction
from step import StepConfig


FIRST = ("model", "dataset", "image_folder")


def recipe_text(config: PlanConfig, chosen: Prediction, recipe: Path) -> str:
    """All flags of the step, so that no default can come between; first those that the plan has found."""
    flags = {each.name: getattr(chosen.config, each.name) for each in fields(StepConfig)}
    flags |= {"dataset": config.dataset, "image_folder": config.image_folder}
    found = [name for name in SEARCHED if name in flags]
    groups = (FIRST, found, [name for name in flags if name not in (*FIRST, *found)])
    comments = ("", "# What the plan has found:", "# As you gave it, or by default:")
    width, height = chosen.config.photo_size
    lines = [
        f"# Planned for {config.card.title}: rows of {chosen.config.max_seq_len} tokens with "
        f"{chosen.config.images_per_sample} image{'s' * (chosen.config.images_per_sample != 1)} of {width}x{height}.",
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
    processes = f" --num_processes {strategy.world_size}" if strategy.world_size > 1 else ""
    flags = f"--recipe {recipe}" if recipe is not None else " ".join(found_flags(config, chosen))
    return f"accelerate launch --config_file {config.launch_file(strategy)}{processes} train.py {flags}"


def found_flags(config: PlanConfig, chosen: Prediction) -> list[str]:
    """The step's flags that differ from train.py's defaults, as words of a command line."""
    words = [f"--model {config.model}"]
    for each in fields(StepConfig):
        value = getattr(chosen.config, each.name)
        default = each.default_factory() if callable(each.default_factory) else each.default
        if each.name != "model" and value is not None and value != default:
            words.append(f"--{each.name} {' '.join(value) if isinstance(value, list) else value}")
    return words
