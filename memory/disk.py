"""Predict what a run writes to the disk: a checkpoint, and the weights at the end.

    checkpoint_bytes({"layers.0.lora_A.weight": [16, 2048]}, "adamw_torch")

A checkpoint is the same under every strategy (training/training_state.py): for each trained parameter one fp32 tensor,
unsharded, and one for each of the optimizer's moments. Only the random numbers are kept for each process.
"""

import math
from collections.abc import Mapping, Sequence

from models.config import MIXED_PRECISIONS


FP32_BYTES = 4
MOMENTS = {"adamw_torch": 2, "sgd": 0}  # of the optimizer, for each parameter
# Measured on checkpoints of train.py, with what the small files hold besides names.
TENSOR_ENTRY_BYTES = 76  # in a safetensors header: type, shape, offsets and the first part of the name
SHAPE_ENTRY_BYTES = 12  # of a trained parameter in state.json
RANDOM_STATE_BYTES = 23_600  # of a process in state.json: Python's, NumPy's and PyTorch's, as JSON
STATE_BYTES = 1_400  # the rest of state.json, and checksums.json


def checkpoint_bytes(shapes: Mapping[str, Sequence[int]], optim: str, num_processes: int = 1) -> int:
    """Bytes of one checkpoint.

    Args:
        shapes: the unsharded shape of each trained parameter, by name.
        optim: the flag's value.
    """
    num_moments = MOMENTS[optim]
    has_step = num_moments > 0  # AdamW counts its steps, for each parameter
    num_tensors = 1 + num_moments + has_step
    nbytes = STATE_BYTES + num_processes * RANDOM_STATE_BYTES
    for name, shape in shapes.items():
        nbytes += FP32_BYTES * (math.prod(shape) * (1 + num_moments) + has_step)
        nbytes += num_tensors * (len(name) + TENSOR_ENTRY_BYTES) + len(name) + SHAPE_ENTRY_BYTES
    return nbytes


def output_bytes(num_trained: int, num_frozen: int, mixed_precision: str, is_deepspeed: bool) -> int:
    """Bytes of the weights that a run leaves: the adapter, or the model.

    Args:
        num_trained: trained numbers. They are held in fp32, under DeepSpeed in the precision of the compute.
        num_frozen: the others that are saved with them: an adapter's file has none, a model's all.
    """
    frozen_bytes = MIXED_PRECISIONS[mixed_precision].itemsize
    return num_trained * (frozen_bytes if is_deepspeed else FP32_BYTES) + num_frozen * frozen_bytes
