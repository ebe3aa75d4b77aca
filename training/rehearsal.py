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
from training.gradients import GradientCheck, outside_language_model
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
    sample: dict[str, torch.Tensor] | None,
    announce: Callable[[str, Row], None],
) -> None:
    """Run what needs most memory in training and in evaluation, with the optimizer's state in place, and look at the
    gradients of a sample.

    Afterwards everything is as if nothing had run.

    Args:
        model: prepared, in training mode.
        processor: the model's.
        longest: the largest row of the training data.
        longest_question: of the held-out data; None: there is none.
        sample: forward's arguments for real data, with images if there are any; None: its gradients are not looked at.
        announce: is told what comes next, and its row.

    Raises:
        UserError: no gradient reaches what is to be trained.
        RuntimeError: parameters or the optimizer's state are not what they were.
    """
    random_numbers, values = rng_state(), state.values()
    state.make_optimizer_state()
    before = state.checksums()
    with allocation_history():
        announce("before step 1, in the largest step that the data can bring", longest)
        batch = send_to_device(worst_case_batch(processor, config, longest), accelerator.device)
        run_step(accelerator, model, state, [batch] * with_few_micro_batches(config).gradient_accumulation_steps)
        if sample is not None:
            check_gradients(accelerator, model, state, send_to_device(sample, accelerator.device))
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
    batches: list[dict[str, torch.Tensor]],
    loss_weight: int = 0,
) -> None:
    """Forward and backward of an update that changes nothing.

    With accumulation there are two micro-batches: the second one finds gradients in place. A loss of 0 makes every
    gradient 0. That matters under DeepSpeed alone, whose engine keeps gradients in buffers of its own and empties them
    only in its step: with gradients, moments and a learning rate of 0, the step leaves everything but its counter as
    it was. Elsewhere no step is taken. Its few temporaries come when the activations are freed.
    """
    state.stop_learning()
    for i, batch in enumerate(batches, start=1):
        accelerator.sync_gradients = i == len(batches)  # DeepSpeed's engine steps after this micro-batch
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        accelerator.backward(loss_weight * loss)
    state.forget_steps()
    for parameter in state.parameters.values():
        parameter.grad = None


def check_gradients(
    accelerator: Accelerator, model: nn.Module, state: TrainingState, sample: dict[str, torch.Tensor]
) -> None:
    """Raise UserError if a gradient of the sample's loss is not finite, or does not reach what is to be trained."""
    check = GradientCheck(state.parameters)
    with check.watching():
        run_step(accelerator, model, state, [sample], loss_weight=1)
    has_images = any(tensor.is_floating_point() for tensor in sample.values())
    needs_images = () if has_images else outside_language_model(accelerator.unwrap_model(model), state.parameters)
    for line in check.report(state.loss_scale() is not None, needs_images):
        accelerator.print(line)


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
