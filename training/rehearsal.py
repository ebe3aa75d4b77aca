"""The worst step that the data can bring, before the first one: an out of memory comes now, not at step 88."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import nn

from data.worst_case import Row, with_few_micro_batches, with_rows_of, worst_case_batch, worst_case_questions
from models.generation import answer_worst_case
from training.training_state import TrainingState, load_rng_state, rng_state


HISTORY_ENTRIES = 20_000  # allocations noted for the snapshot of an out-of-memory error: a few MiB of host memory


def rehearse(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainingState,
    config: Any,
    longest: Row,
    longest_question: Row | None,
    announce: Callable[[str, Row], None],
) -> None:
    """Run what takes most of training and of evaluation, with the optimizer's state in place. All is then as if it had
    not run.

    Args:
        model: prepared, in training mode.
        config: train.py's.
        longest: the largest row of the training data.
        longest_question: of the held-out data; None: there is none.
        announce: is told what comes next, and its row.
    """
    random_numbers, values = rng_state(), state.values()
    state.make_optimizer_state()
    with allocation_history():
        announce("before step 1, in the largest step that the data can bring", longest)
        run_step(accelerator, model, config, worst_batch(accelerator, model, config, longest, worst_case_batch))
        for parameter in state.parameters.values():
            parameter.grad = None
        if longest_question is not None:
            announce("before step 1, in the largest batch of held-out questions", longest_question)
            questions = worst_batch(accelerator, model, config, longest_question, worst_case_questions)
            answer_worst_case(accelerator, model, questions)
    state.load_values(values)
    load_rng_state(random_numbers)


def worst_batch(
    accelerator: Accelerator, model: nn.Module, config: Any, row: Row, make_batch: Callable
) -> dict[str, torch.Tensor]:
    """`make_batch` is one of data.worst_case; its batch of such rows, on the device."""
    model_config = accelerator.unwrap_model(model).config
    batch = make_batch(model_config, with_rows_of(config, row.num_tokens), row.num_images)
    return send_to_device(batch, accelerator.device)


def run_step(accelerator: Accelerator, model: nn.Module, config: Any, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward. With accumulation two micro-batches run: in the second one gradients are there already.

    The optimizer's own step is left out. Its few temporaries come when the activations are gone.
    """
    num_micro_batches = with_few_micro_batches(config).gradient_accumulation_steps
    for i in range(num_micro_batches):
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        backward(accelerator, loss, is_last=i + 1 == num_micro_batches)


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
    # Stacks for allocations alone: with those of frees too, PyTorch gathers Python frames while the exception is in
    # flight by which checkpointing ends a recomputation early, and the exception is lost (SystemError).
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY_ENTRIES)
    yield  # left on after an error: the snapshot is taken from it
    torch.cuda.memory._record_memory_history(enabled=None)
