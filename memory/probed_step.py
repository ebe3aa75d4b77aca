"""The step that is predicted and measured: train.py's own, on the largest batch, and how a run ends after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import ProcessorMixin, get_scheduler

import step
from chat.encoding import num_image_tokens
from chat.images import shrunk_size
from data.worst_case import Row, with_few_micro_batches, worst_case_batch, worst_case_questions
from memory.config import ProbeConfig
from models.gather import gather_trained
from models.generation import answer_worst_case
from models.loading import is_text_only, load_config, load_processor


# DeepSpeed records the order of the modules in the first update and fetches ahead from the second one on, so the third
# is the first one like all others.
DEEPSPEED_UPDATES = 3


Tensors = dict[str, torch.Tensor]
Inputs = tuple[Tensors, Tensors | None]  # a batch, and held-out questions


def worst_case_inputs(config: ProbeConfig) -> Inputs:
    """The largest batch, and the largest batch of held-out questions if there are any, by the model's own processor.

    They must be real: call it outside of any mode that makes tensors fake.

    Raises:
        UserError: the images need more positions than a row has.
    """
    processor = processor_of(config)
    row = Row(config.max_seq_len, config.images_per_sample, config.photo_size)
    questions = worst_case_questions(processor, config, row) if config.eval_samples else None
    return worst_case_batch(processor, config, row), questions


def num_image_positions(config: ProbeConfig) -> int:
    """The positions that a row's images take."""
    processor = processor_of(config)
    if processor is None or not config.images_per_sample:
        return 0
    size = shrunk_size(config.photo_size, config.max_image_pixels)
    return config.images_per_sample * num_image_tokens(processor, size, config.images_per_sample)


def processor_of(config: ProbeConfig) -> ProcessorMixin | None:
    """The model's; None: it reads text alone, and what it takes does not depend on its tokenizer."""
    return None if is_text_only(load_config(config.model)) else load_processor(config.model)


@dataclass
class ProbedStep:
    """train.py's model, optimizer and step on the largest batch that can come.

        probed = ProbedStep.build(config, accelerator)
        probed.prepare()
        probed.run_updates()
        probed.end_run()

    A trace and a measurement differ only in what watches these four calls.
    """

    config: ProbeConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict[str, torch.Tensor]
    questions: dict[str, torch.Tensor] | None  # held out; None: --eval_samples 0

    @classmethod
    def build(
        cls,
        config: ProbeConfig,
        accelerator: Accelerator,
        model: nn.Module | None = None,
        device: str | torch.device = "cpu",
        inputs: Inputs | None = None,
    ) -> "ProbedStep":
        """`model`, `inputs` (worst_case_inputs's): those that are made already. `device`: where the batch lies.

        Raises:
            UserError: the images need more positions than a row has.
        """
        if model is None:
            model = step.build_model(config, accelerator.state.deepspeed_plugin is not None, accelerator.is_fsdp2)
        batch, questions = inputs or worst_case_inputs(config)
        is_fused = step.fuses_optimizer(accelerator, config.optim)
        optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3, fused=is_fused)
        return cls(config, accelerator, model.train(), optimizer, send_to_device(batch, device), questions)

    def prepare(self, **options: list[bool]) -> None:
        """step.prepare."""
        self.model, self.optimizer = step.prepare(self.accelerator, self.model, self.optimizer, **options)
        self.scheduler = get_scheduler("constant", self.optimizer)

    def micro_batch(self, waits_for_norm: bool = False) -> None:
        """The last one of an update includes the optimizer's step. `waits_for_norm`: as train.py does, to skip a step
        whose norm is not finite; that takes no memory, but time."""
        with self.accelerator.accumulate(self.model):
            step.training_step(
                self.accelerator,
                self.model,
                self.optimizer,
                self.scheduler,
                self.batch,
                num_items_in_batch=self.batch["labels"].numel(),
                max_grad_norm=self.config.max_grad_norm,
                skip_nonfinite=waits_for_norm,
            )

    def run_updates(self, num_updates: int = 2, waits_for_norm: bool = False) -> None:
        """From the second update on the optimizer has its state."""
        for _ in range(num_updates * self.accelerator.gradient_accumulation_steps):
            self.micro_batch(waits_for_norm)

    def end_run(self, enter_phase: Callable[[str], None] = lambda phase: None, copies_to_host: bool = True) -> None:
        """What train.py does after the last update: copy what was trained to the host, and answer held-out questions.

        `copies_to_host` False: the copies are left out, because the one device that is traced would have to hold them.
        """
        enter_phase("save")
        if copies_to_host:
            gather_trained(self.accelerator, self.model)
        clear_device_cache()
        if self.questions is not None:
            enter_phase("evaluate")
            device = self.batch["input_ids"].device
            questions = {name: tensor.to(device, copy=True) for name, tensor in self.questions.items()}
            answer_worst_case(self.accelerator, self.model, questions)

    def watch_phases(self, enter_phase: Callable[[str], None]) -> None:
        """Call `enter_phase` whenever the step goes on to `forward`, `backward` or `step`."""
        self.model.register_forward_pre_hook(
            lambda *_: enter_phase("forward") if self.model.training else None, prepend=True
        )
        backward = self.accelerator.backward

        def backward_with_phase(loss: torch.Tensor, **kwargs: object) -> None:
            enter_phase("backward")
            backward(loss, **kwargs)
            enter_phase("step")

        self.accelerator.backward = backward_with_phase


@contextmanager
def local_accelerator(config: ProbeConfig) -> Iterator[Accelerator]:
    """An accelerator of one CPU process. Accelerators share their state; the caller's is restored at the end."""
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


def launched_accelerator(config: ProbeConfig) -> Accelerator:
    """The accelerator of a process that a launcher has started, with few micro-batches an update."""
    return step.build_accelerator(
        config.mixed_precision,
        config.per_device_train_batch_size,
        with_few_micro_batches(config).gradient_accumulation_steps,
        config.max_grad_norm,
    )
