"""The largest step that the data can bring, before the first one: out of memory is found now, not at step 88."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from transformers import ProcessorMixin

from data.worst_case import Row, with_few_micro_batches, worst_case_batch, worst_case_questions
from models.generation import answer_worst_case
from step import StepConfig
from training.random_state import load_rng_state, rng_state
from training.training_state import TrainingState


HISTORY_ENTRIES = 20_000  # allocations noted for the snapshot of an out-of-memory error: a few MiB of host memory


def rehearse(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    state: TrainingState,
    config: StepConfig,
    longest: Row,
    longest_question: Row | None,
    announce: Callable[[str, Row], None],
) -> None:
    """Run what needs most memory in training and in evaluation, with the optimizer's state in place.

    Afterwards everything is as if nothing had run.

    Args:
        model: prepared, in training mode.
        processor: the model's.
        longest: the largest row of the training data.
        longest_question: of the held-out data; None: there is none.
        announce: is told what comes next, and its row.

    Raises:
        RuntimeError: parameters or the optimizer's state are not what they were.
    """
    random_numbers, values = rng_state(), state.values()
    state.make_optimizer_state()
    before = state.checksums()
    with allocation_history():
        announce("before step 1, in the largest step that the data can bring", longest)
        batch = send_to_device(worst_case_batch(processor, config, longest), accelerator.device)
        run_step(accelerator, model, state, config, batch)
        if longest_question is not None:
            announce("before step 1, in the largest batch of held-out questions", longest_question)
            questions = worst_case_questions(processor, config, longest_question)
            answer_worst_case(accelerator, model, send_to_device(questions, accelerator.device))
    state.load_values(values)
    load_rng_state(random_numbers)
    if state.checksums() != before:
        raise RuntimeError(
            "the rehearsal has changed what is to be trained, which is a bug; --no_rehearse leaves it out"
        )


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainingState,
    config: StepConfig,
    batch: dict[str, torch.Tensor],
) -> None:
    """Forward and backward of an update that changes nothing.

    With accumulation two micro-batches run: the second one finds gradients in place. A loss of 0 makes every gradient
    0. That matters under DeepSpeed alone, whose engine keeps gradients in buffers of its own and empties them only in
    its step: with gradients, moments and a learning rate of 0, the step leaves everything but its counter as it was.
    Elsewhere no step is taken. Its few temporaries come when the activations are freed.
    """
    state.stop_learning()
    num_micro_batches = with_few_micro_batches(config).gradient_accumulation_steps
    for i in range(num_micro_batches):
        accelerator.sync_gradients = i + 1 == num_micro_batches  # DeepSpeed's engine steps after this micro-batch
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        accelerator.backward(0 * loss)
    state.forget_steps()
    for parameter in state.parameters.values():
        parameter.grad = None


@contextmanager
def allocation_history() -> Iterator[None]:
    """On a GPU: note who allocates what, for a snapshot if memory runs out."""
    if not torch.cuda.is_available():
        yield
        return
    # Stacks for allocations alone: with those of frees too, PyTorch gathers Python frames while the exception is in
    # flight by which checkpointing ends a recomputation early, and the exception is lost (SystemError).
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY_ENTRIES)
    yield  # left on after an error: the snapshot is taken from it
    torch.cuda.memory._record_memory_history(enabled=None)
