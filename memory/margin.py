"""How far a prediction may be off before someone should look: the error is prediction / measurement - 1."""

MEMORY_MARGIN = 0.02  # of the bytes of all tensors at the peak
# Where the allocator keeps more of the device than its replay. A GPU frees what ZeRO-3 has gathered only when the
# stream that reads it has got there: MGM-2B with four rows took 6.7 % more on an H200, Qwen3-VL-8B 13.1 % more on two.
# Logits of all tokens leave gaps (6.4 %). results/gpu/ has these rows.
ZERO3_MARGIN, ZERO3_MARGIN_OF_SEVERAL, FULL_LOSS_MARGIN = 0.12, 0.14, 0.08
# The worst error of an update's seconds over the rows from which no constant comes: results/gpu/step_time.json.
TIME_MARGIN = 0.33


def device_margin(strategy: str, loss: str, world_size: int) -> float:
    """By what share of the prediction the device may hold more."""
    if strategy == "zero3":
        return ZERO3_MARGIN if world_size == 1 else ZERO3_MARGIN_OF_SEVERAL
    return FULL_LOSS_MARGIN if loss == "full" else MEMORY_MARGIN
