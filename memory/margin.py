"""How far a prediction may be off before someone should look: the error is prediction / measurement - 1."""

MEMORY_MARGIN = 0.02  # of the bytes of all tensors at the peak
# The worst error of an update's seconds over the rows from which no constant comes: results/gpu/step_time.json.
TIME_MARGIN = 0.35
