"""The trainers that benchmarks/step.py compares with, each set up as its documentation does."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput

import step
from benchmarks.step_models import Batch, auto_class, set_adapter
from benchmarks.step_watch import Step, StepWatch
from models.loading import load_config, load_processor
from utils import UserError


TRAINER, TRL = "Trainer + PEFT", "TRL SFTTrainer"
PEERS = (TRAINER, f"{TRAINER}, Liger", TRL, f"{TRL}, Liger")


def peers(device: str) -> tuple[str, ...]:
    """Those that run on the device. Raises UserError for a package that is missing."""
    for package in ("trl", *(["liger_kernel"] if device == "cuda" else [])):
        if find_spec(package) is None:
            raise UserError(f"{package} is missing: pip install -r benchmarks/requirements.txt")
    return tuple(peer for peer in PEERS if device == "cuda" or not uses_liger(peer))


def uses_liger(kind: str) -> bool:
    return kind.endswith("Liger")


def import_trainer(kind: str) -> None:
    """What takes seconds, so that processes do it side by side."""
    if kind.startswith(TRL):
        import trl  # noqa: F401
    if uses_liger(kind):
        import liger_kernel.transformers  # noqa: F401


class WatchCallback(TrainerCallback):
    """Each step without loading its batch before and logging after it."""

    def __init__(self) -> None:
        self.watch = StepWatch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.end()


class Peer:
    """`make_trainer`'s Trainer on a model with PEFT's adapter."""

    def __init__(self, kind: str, device: str, model: str, gradient_checkpointing: bool, learning_rate: float) -> None:
        self.device, self.has_begun = device, False
        config = load_config(model)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        base = auto_class(config).from_pretrained(model, dtype=dtype).to(device)
        flags = step.StepConfig()
        lora = LoraConfig(r=flags.lora_r, lora_alpha=flags.lora_alpha, target_modules=flags.lora_target_modules)
        self.model = get_peft_model(base, lora)
        set_adapter(self.model)
        self.folder = tempfile.TemporaryDirectory()
        arguments = {
            "output_dir": self.folder.name,
            "learning_rate": learning_rate,
            "max_grad_norm": flags.max_grad_norm,
            "optim": "adamw_torch",
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_liger_kernel": uses_liger(kind),
            "use_cpu": device == "cpu",
            "bf16": device == "cuda",
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        make: Callable[..., Trainer] = make_sft_trainer if kind.startswith(TRL) else make_plain_trainer
        placeholder = datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])  # the collator makes the batch
        self.trainer = make(self.model, arguments, placeholder)
        self.trainer.remove_callback(transformers.PrinterCallback)
        callback = WatchCallback()
        self.watch = callback.watch
        self.trainer.add_callback(callback)

    def begin(self, name: str, batch: Batch) -> None:
        """Train on this batch from now on, from the beginning."""
        if self.has_begun:
            set_adapter(self.model)
            self.trainer.optimizer = self.trainer.lr_scheduler = None  # made anew by the next `train`
        self.has_begun = True
        self.trainer.data_collator = lambda _: dict(batch)  # TRL adds to it

    def run(self, num_steps: int) -> list[Step]:
        self.watch.seconds.clear()
        self.trainer.args.max_steps = num_steps
        self.trainer.train()
        logs = [log for log in self.trainer.state.log_history if "grad_norm" in log]
        return [
            Step(seconds, log["loss"], log["grad_norm"]) for seconds, log in zip(self.watch.seconds, logs, strict=True)
        ]


def make_plain_trainer(model: PeftModel, arguments: dict[str, Any], dataset: datasets.Dataset) -> Trainer:
    return Trainer(model, TrainingArguments(**arguments), train_dataset=dataset)


def make_sft_trainer(model: PeftModel, arguments: dict[str, Any], dataset: datasets.Dataset) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # nothing else needs it: it is in benchmarks/requirements.txt alone

    # TRL 1.16 calls it "nll": then it is the default. With Liger it keeps this loss, and takes Liger's layers alone.
    options = {"loss_type": "chunked_nll", "dataset_kwargs": {"skip_prepare_dataset": True}}
    tokenizer = load_processor("data/tiny_mgm").tokenizer  # required, although the row is tokenized already
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    model.register_forward_hook(check_loss_is_chunked)
    return trainer


def check_loss_is_chunked(model: PeftModel, inputs: tuple, output: ModelOutput) -> None:
    """Raise RuntimeError if TRL's model has made logits."""
    if getattr(output, "logits", None) is not None:
        raise RuntimeError("TRL has made all logits: loss_type chunked_nll is not on")
