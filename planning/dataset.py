"""The user's own data: how long its samples are, and which images a row of them may have."""

from dataclasses import replace

import datasets
import numpy as np

from data.dataset import open_dataset
from data.lengths import column_values, with_lengths
from data.worst_case import longest_row
from models.loading import load_processor
from planning.config import PlanConfig
from utils import UserError


def measured_records(config: PlanConfig, max_seq_len: int, max_image_pixels: int) -> datasets.Dataset:
    """The samples that train.py would train on, with their lengths. Raises UserError as train.py does."""
    dataset = open_dataset(config.dataset, config.image_folder)
    records = with_lengths(dataset, load_processor(config.model), max_seq_len, max_image_pixels)
    is_fitting = column_values(records, "num_label_tokens") > 0
    if not is_fitting.any():
        raise UserError(f"--dataset {config.dataset}: no sample fits --max_seq_len {max_seq_len}, choose a larger one")
    return records.select(np.flatnonzero(is_fitting))


def num_tokens(records: datasets.Dataset, max_seq_len: int) -> np.ndarray:
    """Of each sample, at most `max_seq_len`."""
    return np.minimum(column_values(records, "num_tokens"), max_seq_len)


def with_images_of_dataset(config: PlanConfig) -> PlanConfig:
    """Rows are planned with as many images as the data's largest row may have, and as large ones; what is typed stays.
    Rows are still as long as --max_seq_len: the longest may come with other data."""
    records = measured_records(config, config.max_seq_len, config.max_image_pixels)
    lengths = num_tokens(records, config.max_seq_len)
    row = longest_row(records, lengths, load_processor(config.model), config.max_image_pixels)
    width, height = row.image_size
    images = {"images_per_sample": row.num_images, "image_size": f"{width}x{height}"}
    return replace(config, **{name: value for name, value in images.items() if not config.stays(name)})
