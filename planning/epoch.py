"""How long an epoch of the user's own data takes, by the chosen step."""

from dataclasses import dataclass, replace

import numpy as np

from data.packing import pack
from models.loading import is_preset
from planning.budget import Budget
from planning.config import PlanConfig
from planning.dataset import measured_records, num_tokens
from planning.predictions import Prediction, Predictions
from planning.space import changed


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
    packed: "Packed | None"


@dataclass(frozen=True)
class Packed:
    """An epoch with several samples in a row. An update then has about as many samples as before, not just as many: so
    a plan tells of it, and does not choose it."""

    num_rows: int
    gradient_accumulation_steps: int
    seconds: float
    device_bytes: int
    fits: bool


def epoch_of(config: PlanConfig, budget: Budget, chosen: Prediction, predictions: Predictions) -> Epoch:
    """Opens the data set, as train.py would, and counts its tokens. Raises UserError as train.py does."""
    step = chosen.config
    lengths = num_tokens(measured_records(config, step.max_seq_len, step.max_image_pixels), step.max_seq_len)
    num_rows = len(pack(lengths, step.max_seq_len, step.seed)) if step.packing else len(lengths)
    num_updates = -(-num_rows // (config.samples_per_update * step.world_size))
    mean_tokens = int(np.ceil(lengths.mean()))
    length = step.max_seq_len if step.packing else min(-(-mean_tokens // LENGTH_STEP) * LENGTH_STEP, step.max_seq_len)
    (mean_step,) = predictions.of([replace(step, max_seq_len=length)])
    return Epoch(
        num_samples=len(lengths),
        num_updates=num_updates,
        mean_tokens=mean_tokens,
        most_seconds=num_updates * chosen.step_seconds,
        seconds=None if mean_step.problem else num_updates * mean_step.step_seconds,
        counts_bytes=is_preset(config.model),
        packed=None if step.packing or config.stays("packing") else packed(chosen, budget, lengths, predictions),
    )


def packed(chosen: Prediction, budget: Budget, lengths: np.ndarray, predictions: Predictions) -> Packed | None:
    """The chosen step on packed rows. None: an update's samples fill no row, or the model or its attention cannot keep
    them apart."""
    step = chosen.config
    num_rows = len(pack(lengths, step.max_seq_len, step.seed))
    num_steps = round(step.gradient_accumulation_steps * num_rows / len(lengths))
    wanted = changed(step, {"packing": True, "gradient_accumulation_steps": max(num_steps, 1)})
    if not num_steps or isinstance(wanted, str):
        return None
    (found,) = predictions.of([wanted])
    if found.problem is not None:
        return None
    rows = wanted.per_device_train_batch_size * wanted.gradient_accumulation_steps * wanted.world_size
    return Packed(
        num_rows=num_rows,
        gradient_accumulation_steps=wanted.gradient_accumulation_steps,
        seconds=-(-num_rows // rows) * found.step_seconds,
        device_bytes=found.device_bytes,
        fits=budget.fits(found),
    )
