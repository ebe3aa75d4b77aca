"""How far a prediction may be off before someone should look: the error is prediction / measurement - 1."""

MEMORY_MARGIN = 0.02  # of the bytes of all tensors at the peak
# Of what the device holds, where the allocator keeps more than its replay: a GPU frees what ZeRO-3 has gathered only
# when the stream that reads it has got there (MGM-2B on an H200: 2.3 % with one row, 7.4 % with four, 9.5 % with
# eight), and logits of all tokens leave gaps (6.0 %).
ZERO3_MARGIN, FULL_LOSS_MARGIN = 0.12, 0.08
# The worst error of an update's seconds over the rows from which no constant comes: results/gpu/step_time.json.
TIME_MARGIN = 0.33


def device_margin(strategy: str, loss: str) -> float:
    """By what share of the prediction the device may hold more."""
    if strategy == "zero3":
        return ZERO3_MARGIN
    return FULL_LOSS_MARGIN if loss == "full" else MEMORY_MARGIN
