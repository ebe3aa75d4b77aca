"""What is predicted and measured alike: the worst case of a batch, and a few of train.py's steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import PreTrainedConfig, get_scheduler

import train
from processing_mgm import IGNORE_INDEX


@contextmanager
def probe_accelerator(config: train.StepConfig) -> Iterator[Accelerator]:
    """An accelerator of one CPU process. Accelerators share their state; the caller's is put back in the end."""
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    saved = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield Accelerator(
            cpu=True,
            mixed_precision=config.mixed_precision,
            # Gradients that wait for the next micro-batch are there from the second one on.
            gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2),
        )
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)


def worst_case_batch(
    model_config: PreTrainedConfig, config: train.StepConfig, images_per_sample: int
) -> dict[str, torch.Tensor]:
    """Forward's arguments as train.py's collator makes them: full rows, images first, every text position labelled.

    A row that is shorter than the others is padded, and then attention needs a mask. So with several rows the last one
    lacks a token. A packed row has as many samples as its images leave room for, at least two, so that it needs one.
    """
    rows, length = config.per_device_train_batch_size, config.max_seq_len
    image_length = images_per_sample * model_config.num_image_tokens
    if image_length > length:
        raise ValueError(f"{images_per_sample} images take {image_length} positions, but max_seq_len is {length}")
    if config.packing and images_per_sample:
        images_per_sample *= length // image_length
        image_length = images_per_sample * model_config.num_image_tokens
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    input_ids[:, :image_length] = model_config.image_token_id
    labels = input_ids.clone()
    labels[:, :image_length] = IGNORE_INDEX
    batch = {"input_ids": input_ids, "labels": labels}
    batch["image_positions"] = (torch.arange(rows)[:, None] * length + torch.arange(image_length)).flatten()
    batch["label_positions"] = (
        torch.arange(rows)[:, None] * length + torch.arange(max(image_length, 1), length)
    ).flatten()
    if config.packing:
        batch["position_ids"] = torch.arange(length).remainder(length // 2 + 1).repeat(rows, 1)
    else:
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
        if rows > 1:
            batch["attention_mask"][-1, -1] = 0
    if images_per_sample:
        for key, tower in (("pixel_values", "vision_config"), ("pixel_values_aux", "vision_config_aux")):
            size = getattr(model_config, tower).image_size
            batch[key] = torch.zeros(rows * images_per_sample, 3, size, size)
    return batch


def run_updates(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    config: train.StepConfig,
    num_updates: int = 2,
) -> None:
    """Updates of the prepared model, with as many micro-batches each as the accelerator accumulates. The second one
    finds the optimizer's state in place."""
    scheduler = get_scheduler("constant", optimizer)
    num_items_in_batch = batch["labels"].numel()
    for _ in range(num_updates * accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            train.training_step(
                accelerator, model, optimizer, scheduler, batch, num_items_in_batch, config.max_grad_norm
            )


def watch_phases(accelerator: Accelerator, model: nn.Module, enter_phase: Callable[[str], None]) -> None:
    """Tell `enter_phase` whenever training_step goes on to `forward`, `backward` or `step`."""
    model.register_forward_pre_hook(lambda *_: enter_phase("forward"))
    backward = accelerator.backward

    def backward_with_phase(loss: torch.Tensor, **kwargs: object) -> None:
        enter_phase("backward")
        backward(loss, **kwargs)
        enter_phase("step")

    accelerator.backward = backward_with_phase
