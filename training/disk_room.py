"""Before the first step: has the disk room for what the run will write?"""

import math
import shutil
import sys
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from memory.disk import checkpoint_bytes, output_bytes
from models.lora import count_parameters
from training.checkpoint_files import list_checkpoints
from training.config import TrainConfig
from utils import size


def warn_of_little_room(
    accelerator: Accelerator, config: TrainConfig, model: nn.Module, shapes: dict[str, list[int]], updates: range
) -> None:
    """Print a warning if checkpoints, and the weights at the end, may not fit on the disk. The main process prints.

    Args:
        shapes: the unsharded shape of each trained parameter, by name.
        updates: the numbers of those that are still to come.
    """
    if not accelerator.is_main_process:
        return
    folder, is_deepspeed = Path(config.output_dir), accelerator.state.deepspeed_plugin is not None
    one_bytes = checkpoint_bytes(shapes, config.optim, accelerator.num_processes)
    num_trained = sum(map(math.prod, shapes.values()))
    num_frozen = 0 if config.lora_r else count_parameters(model)[0] - num_trained
    last_bytes = output_bytes(num_trained, num_frozen, config.mixed_precision, is_deepspeed)
    num_saves = count_saves(updates, config.save_steps)
    num_more = num_more_checkpoints(num_saves, len(list_checkpoints(folder)), config.save_total_limit)
    free, needed = free_disk_bytes(folder), num_more * one_bytes + last_bytes
    if free < needed:
        print(
            f"warning: {folder} has {size(free)} free, and the run may need {size(needed)}: {num_more} x "
            f"{size(one_bytes)} of checkpoints at a time, and at the end {size(last_bytes)} of weights. Make room, or "
            "choose another --output_dir or a smaller --save_total_limit",
            file=sys.stderr,
        )


def count_saves(updates: range, save_steps: int) -> int:
    """The updates after which a checkpoint is written: every `save_steps`-th, and the last. 0: none."""
    return sum(step % save_steps == 0 or step == updates[-1] for step in updates) if save_steps else 0


def num_more_checkpoints(num_saves: int, num_there: int, save_total_limit: int) -> int:
    """How many more checkpoints than now there will be at a time. The oldest goes when a new one is written.

    `save_total_limit` 0: all are kept.
    """
    return min(num_saves, max(save_total_limit + 1 - num_there, 1)) if save_total_limit else num_saves


def free_disk_bytes(folder: Path) -> int:
    """Of the disk that the folder, or its nearest parent that exists, is on."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free
