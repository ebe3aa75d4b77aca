"""The worst step that the data can bring, before the first one: an out of memory comes now, not at step 88."""

from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from data.worst_case import with_few_micro_batches, worst_case_batch
from memory_forecast import Row
from training_state import TrainingState, load_rng_state, rng_state


HISTORY_ENTRIES = 20_000  # allocations noted for the snapshot of an out-of-memory error: a few MiB of host memory


def rehearse(accelerator: Accelerator, model: nn.Module, state: TrainingState, config: Any, longest: Row) -> None:
    """Forward and backward of the largest batch with the optimizer's state in place; all is then as if it had not run.

    With accumulation two micro-batches run: in the second one gradients are there already. The optimizer's own step is
    left out. Its few temporaries come when the activations are gone.

    Args:
        model: prepared, in training mode.
        config: train.py's.
        longest: the data's.
    """
    random_numbers, values = rng_state(), state.values()
    state.make_optimizer_state()
    worst = with_few_micro_batches(config)
    worst.max_seq_len = longest.num_tokens
    batch = worst_case_batch(accelerator.unwrap_model(model).config, worst, longest.num_images)
    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
    with allocation_history():
        for i in range(worst.gradient_accumulation_steps):
            loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
            backward(accelerator, loss, is_last=i + 1 == worst.gradient_accumulation_steps)
    for parameter in state.parameters.values():
        parameter.grad = None
    state.load_values(values)
    load_rng_state(random_numbers)


def backward(accelerator: Accelerator, loss: torch.Tensor, is_last: bool) -> None:
    """DeepSpeed throws an update away, its gradients too, when a loss is NaN; nothing else of it is public."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        loss = loss * float("nan") if is_last else loss
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=is_last)
    else:
        accelerator.backward(loss)


@contextmanager
def allocation_history() -> Any:
    """On a GPU: note who allocates what, for a snapshot if memory runs out."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python")
    yield  # left on after an error: the snapshot is taken from it
    torch.cuda.memory._record_memory_history(enabled=None)
