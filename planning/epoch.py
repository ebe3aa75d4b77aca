"""How long an epoch of the user's own data takes, by the chosen step."""

from dataclasses import dataclass, replace

import numpy as np

from data.dataset import open_dataset
from data.lengths import column_values, with_lengths
from models.loading import is_preset, load_processor
from planning.config import PlanConfig
from planning.predictions import Prediction, Predictions


LENGTH_STEP = 64  # tokens: the mean length is rounded up to a multiple


@dataclass(frozen=True)
class Epoch:
    """`most_seconds`: if every row were full. `seconds`: with rows of the data's mean length; None: that is too short
    for an image."""

    num_samples: int
    num_updates: int
    mean_tokens: int
    most_seconds: float
    seconds: float | None
    counts_bytes: bool  # a preset has no tokenizer of its own, and counts each byte as a token


def epoch_of(config: PlanConfig, chosen: Prediction, predictions: Predictions) -> Epoch:
    """Opens the data set, as train.py would, and counts its tokens. Raises UserError as train.py does."""
    step = chosen.config
    num_tokens = lengths(config, step.max_seq_len, step.max_image_pixels)
    num_updates = -(-len(num_tokens) // (config.samples_per_update * step.world_size))
    mean_tokens = int(np.ceil(num_tokens.mean()))
    length = min(-(-mean_tokens // LENGTH_STEP) * LENGTH_STEP, step.max_seq_len)
    (mean_step,) = predictions.of([replace(step, max_seq_len=length)])
    return Epoch(
        num_samples=len(num_tokens),
        num_updates=num_updates,
        mean_tokens=mean_tokens,
        most_seconds=num_updates * chosen.step_seconds,
        seconds=None if mean_step.problem else num_updates * mean_step.step_seconds,
        counts_bytes=is_preset(config.model),
    )


def lengths(config: PlanConfig, max_seq_len: int, max_image_pixels: int) -> np.ndarray:
    """The tokens of each sample that train.py would train on, at most `max_seq_len`."""
    dataset = open_dataset(config.dataset, config.image_folder)
    records = with_lengths(dataset, load_processor(config.model), max_seq_len, max_image_pixels)
    is_fitting = column_values(records, "num_label_tokens") > 0
    return np.minimum(column_values(records, "num_tokens"), max_seq_len)[is_fitting]
