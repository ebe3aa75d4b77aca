"""train.py's step for benchmarks/step.py: step.build_model, step.build_optimizer and step.training_step."""

from contextlib import ExitStack, nullcontext

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import get_scheduler

import step
from benchmarks.step_models import MODELS, Batch, set_adapter
from benchmarks.step_watch import Step, StepWatch
from chat.arguments import find_positions
from memory.launch import launched
from memory.strategy import Strategy
from models.loading import is_preset


ZERO3, NF4 = "zero3", "nf4"  # weights and optimizer state in host memory; the language model in 4 bits
WAYS = ("", NF4, ZERO3)


class Ours:
    """`rows`, `num_tokens`: the most that a batch has."""

    def __init__(
        self,
        device: str,
        model: str,
        gradient_checkpointing: bool,
        learning_rate: float,
        rows: int = 1,
        num_tokens: int = 2048,
        way: str = "",
    ) -> None:
        self.device, self.learning_rate, self.has_begun = device, learning_rate, False
        self.flags = step.StepConfig(
            model=model,
            per_device_train_batch_size=rows,
            max_seq_len=num_tokens,
            gradient_checkpointing=gradient_checkpointing,
            mixed_precision="bf16" if device == "cuda" else "no",
            lora_dropout=0.0,  # so that losses agree
            quantize=NF4 if way == NF4 else "none",
        )
        self.environment = ExitStack()  # stays open: DeepSpeed reads the environment in every step
        if way == ZERO3:
            strategy = Strategy.from_config_file("accelerate_configs/zero3.yaml")
            launch = launched(strategy, splits_weights=True, gpu=device == "cuda")
            self.environment.enter_context(launch)
        self.accelerator = step.build_accelerator(
            self.flags.mixed_precision,
            self.flags.per_device_train_batch_size,
            max_grad_norm=self.flags.max_grad_norm,
        )
        is_deepspeed = self.accelerator.state.deepspeed_plugin is not None
        draws_on_device = is_preset(model) and not is_deepspeed  # drawing numbers there is quick
        with torch.device(device) if draws_on_device else nullcontext():
            built = step.build_model(self.flags, is_deepspeed)
        set_adapter(built)
        self.model = (built if is_deepspeed else built.to(device)).train()
        is_fused = step.fuses_optimizer(self.accelerator)
        optimizer = step.build_optimizer(self.model, self.flags.optim, learning_rate, fused=is_fused)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.scheduler = get_scheduler("constant", self.optimizer)
        self.watch = StepWatch()
        clear_device_cache()  # as train.py does

    def begin(self, name: str, batch: Batch) -> None:
        """Train on this batch from now on, from the beginning. Under DeepSpeed once alone."""
        if self.has_begun:
            set_adapter(self.model)
            self.optimizer.state.clear()
        self.has_begun = True
        make_processor = MODELS[name].processor
        positions = find_positions(make_processor and make_processor(), batch)  # train.py's collator adds them
        self.batch = {key: tensor.to(self.device) for key, tensor in (batch | positions).items()}
        self.num_labels = len(positions["label_positions"])

    def run(self, num_steps: int) -> list[Step]:
        self.watch.seconds.clear()
        found = []
        for _ in range(num_steps):
            self.watch.begin()
            with self.accelerator.accumulate(self.model):
                found.append(
                    step.training_step(
                        self.accelerator,
                        self.model,
                        self.optimizer,
                        self.scheduler,
                        self.batch,
                        num_items_in_batch=self.num_labels,
                        max_grad_norm=self.flags.max_grad_norm,
                    )
                )
            self.watch.end()
        return [
            Step(seconds, loss.item(), float(norm))
            for seconds, (loss, norm) in zip(self.watch.seconds, found, strict=True)
        ]
