"""What is predicted and measured alike: a few of train.py's updates, and what comes after its last one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import get_scheduler

import step
from data.worst_case import with_few_micro_batches, worst_case_questions
from models.gather import gather_trained
from models.generation import answer_worst_case


@contextmanager
def probe_accelerator(config: step.StepConfig) -> Iterator[Accelerator]:
    """An accelerator of one CPU process. Accelerators share their state; the caller's is put back in the end."""
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    saved = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield Accelerator(
            cpu=True,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=with_few_micro_batches(config).gradient_accumulation_steps,
        )
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)


def accelerator_for(config: step.StepConfig) -> Accelerator:
    """The accelerator of a process that a launcher has started, with few micro-batches an update."""
    return step.build_accelerator(
        config.mixed_precision,
        config.per_device_train_batch_size,
        with_few_micro_batches(config).gradient_accumulation_steps,
        config.max_grad_norm,
    )


def run_updates(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    config: step.StepConfig,
    num_updates: int = 2,
) -> None:
    """Updates of the prepared model, with as many micro-batches each as the accelerator accumulates. The second one
    finds the optimizer's state in place."""
    scheduler = get_scheduler("constant", optimizer)
    settings = {"num_items_in_batch": batch["labels"].numel(), "max_grad_norm": config.max_grad_norm}
    for _ in range(num_updates * accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            step.training_step(accelerator, model, optimizer, scheduler, batch, **settings)


def end_run(
    accelerator: Accelerator,
    model: nn.Module,
    config: step.StepConfig,
    images_per_sample: int,
    device: str | torch.device,
    enter_phase: Callable[[str], None],
    has_host: bool = True,
) -> None:
    """What train.py does after the last update: what was trained is copied to the host, and held-out questions are
    answered. `has_host` False: the copies are left out, since the one device that is traced would have to hold them.
    """
    enter_phase("save")
    if has_host:
        gather_trained(accelerator, model)
    clear_device_cache()
    if config.eval_samples:
        enter_phase("evaluate")
        questions = worst_case_questions(accelerator.unwrap_model(model).config, config, images_per_sample)
        answer_worst_case(accelerator, model, send_to_device(questions, device))


def watch_phases(accelerator: Accelerator, model: nn.Module, enter_phase: Callable[[str], None]) -> None:
    """Tell `enter_phase` whenever training_step goes on to `forward`, `backward` or `step`."""
    model.register_forward_pre_hook(lambda *_: enter_phase("forward") if model.training else None)
    backward = accelerator.backward

    def backward_with_phase(loss: torch.Tensor, **kwargs: object) -> None:
        enter_phase("backward")
        backward(loss, **kwargs)
        enter_phase("step")

    accelerator.backward = backward_with_phase
