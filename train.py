"""Fine-tune a vision-language model with LoRA on a small GPU. The launch config chooses the strategy, flags the rest:

    accelerate launch --config_file accelerate_configs/zero3.yaml train.py
    accelerate launch --config_file accelerate_configs/zero3.yaml train.py --recipe recipes/mgm_2b_stage2.yaml

Without arguments it fine-tunes the embedded tiny model on the embedded demo. The last line on stdout is a JSON object.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs, PartialState
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin, SchedulerType, get_scheduler

from data.batching import TrainCollator, UpdateBatchSampler, column_values, measure_lengths
from data.dataset import ConversationDataset, open_dataset
from data.make_demo import ensure_demo
from data.packing import PackedCollator, PackedDataset, pack
from eval import evaluate
from run_log import RunLog
from saving import save_trained
from tiled_mlp import tile_frozen_mlps
from utils import (
    MIXED_PRECISIONS,
    ModelConfig,
    UserError,
    check_choice,
    check_minimum,
    load_model,
    load_processor,
    run_script,
)


VISION_LANGUAGE_MODULES = ["multi_modal_projector", "patch_info_mining"]
LANGUAGE_MODULES = ["language_model", "lm_head"]
OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}  # transformers' names


@dataclass(kw_only=True)
class StepConfig(ModelConfig):
    """What a training step is made of: the flags that train.py and memory_probe.py share."""

    lora_r: int = field(default=16, metadata={"help": "rank; 0: no adapter, full fine-tuning"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by alpha / r"})
    lora_dropout: float = 0.1
    lora_bias: str = field(default="none", metadata={"help": "none | all | lora_only"})
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "o_proj"])
    trainable_modules: list[str] | None = field(
        default=None,
        metadata={"help": "trained in full; default projector and mining, with --lora_r 0 the language model too"},
    )
    loss: str = field(
        default="chunked", metadata={"help": "chunked: never the logits of all tokens at once | full: the reference"}
    )
    max_seq_len: int = field(default=2048, metadata={"help": "tokens a row, image positions counted"})
    packing: bool = field(default=False, metadata={"help": "rows of several samples, which do not see each other"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "rows of a micro-batch"})
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations in the backward pass"})
    mlp_tiles: int = field(default=4, metadata={"help": "a checkpointed layer's frozen MLP runs in pieces; 1: whole"})
    optim: str = field(default="adamw_torch", metadata={"help": " | ".join(OPTIMIZERS)})
    max_grad_norm: float = field(default=1.0, metadata={"help": "0: no clipping"})
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        check_choice("optim", self.optim, tuple(OPTIMIZERS))
        check_choice("loss", self.loss, ("chunked", "full"))
        check_minimum(self, lora_r=0, lora_alpha=1, lora_dropout=0, max_seq_len=1, per_device_train_batch_size=1)
        check_minimum(self, gradient_accumulation_steps=1, mlp_tiles=1, max_grad_norm=0)
        if self.packing and self.attn_implementation == "flash_attention_2" and self.per_device_train_batch_size > 1:
            # It finds packed samples in a single row alone; in several they would see each other.
            raise UserError("--packing with flash_attention_2: choose --per_device_train_batch_size 1 or sdpa")
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: it must be below 1")

    @property
    def modules_trained_in_full(self) -> list[str]:
        """`trainable_modules`, or its default, which depends on the rank."""
        if self.trainable_modules is not None:
            return self.trainable_modules
        return VISION_LANGUAGE_MODULES + ([] if self.lora_r else LANGUAGE_MODULES)


@dataclass(kw_only=True)
class TrainConfig(StepConfig):
    # Data
    dataset: str | None = field(default=None, metadata={"help": ".json, .jsonl, .parquet, folder or hub id; the demo"})
    image_folder: str | None = field(default=None, metadata={"help": "default: the folder of the data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "held-out data; the demo's for the demo"})
    eval_samples: int = field(default=256, metadata={"help": "held-out samples to answer, before and after; 0: none"})
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad | square"})
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that open images ahead of the step"})
    group_by_length: bool = field(default=False, metadata={"help": "updates of similar lengths: less padding"})
    # The course of training
    learning_rate: float = 4e-3
    warmup_ratio: float = 0.03
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    num_train_epochs: int = 1
    max_steps: int = field(default=-1, metadata={"help": "updates; overrides num_train_epochs where positive"})
    # Output
    output_dir: str = "outputs/demo"
    overwrite_output_dir: bool = False
    logging_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "square"))
        check_choice("lr_scheduler_type", self.lr_scheduler_type, tuple(kind.value for kind in SchedulerType))
        check_minimum(self, learning_rate=0, warmup_ratio=0, weight_decay=0, num_train_epochs=1, max_steps=-1)
        check_minimum(self, logging_steps=1, eval_samples=0, dataloader_num_workers=0)
        output_dir = Path(self.output_dir)
        if output_dir.exists() and any(output_dir.iterdir()) and not self.overwrite_output_dir:
            raise UserError(f"--output_dir {output_dir} is not empty: choose another or add --overwrite_output_dir")


def main(config: TrainConfig) -> dict | None:
    accelerator = build_accelerator(config, config.output_dir)
    set_seed(config.seed)

    # Whatever is wrong with the input is found here, before the first byte is written.
    processor = load_processor(config.model)
    with accelerator.main_process_first():
        train_dataset, eval_dataset = build_datasets(config, processor)
    model = build_model(config, is_deepspeed=accelerator.state.deepspeed_plugin is not None)

    num_tokens = np.minimum(column_values(train_dataset.records, "num_tokens"), config.max_seq_len)
    num_label_tokens = column_values(train_dataset.records, "num_label_tokens")
    collator_class = TrainCollator
    if config.packing:  # from here on a row of samples stands where a sample stood
        packing = pack(num_tokens, config.max_seq_len, config.seed, accelerator.num_processes)
        accelerator.print(f"Packed {len(num_tokens)} samples into {len(packing)} rows")
        train_dataset, collator_class = PackedDataset(train_dataset, packing), PackedCollator
        num_tokens, num_label_tokens = packing.sums(num_tokens), packing.sums(num_label_tokens)
    sampler = UpdateBatchSampler(
        num_label_tokens,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
        config.seed,
        num_tokens,
        config.group_by_length,
    )
    loader = DataLoader(
        train_dataset,
        batch_sampler=sampler,
        collate_fn=collator_class(processor, config.max_seq_len, config.image_aspect_ratio),
        num_workers=config.dataloader_num_workers,
        persistent_workers=config.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    optimizer = build_optimizer(model, config.optim, config.learning_rate, config.weight_decay)
    num_steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * sampler.num_updates()
    num_warmup_steps = round(config.warmup_ratio * num_steps)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with RunLog(accelerator, config, model, num_steps) as log:
        log.evaluation(0, evaluate(accelerator, model, processor, eval_dataset), eval_dataset)
        model.train()
        clear_device_cache()  # what loading and answering have left behind
        log.start()
        global_step = 0
        while global_step < num_steps:
            label_tokens = sampler.label_tokens_per_update()
            first_step = global_step
            for batch in loader:
                num_items_in_batch = label_tokens[global_step - first_step]
                with accelerator.accumulate(model):
                    loss, grad_norm = training_step(
                        accelerator, model, optimizer, scheduler, batch, num_items_in_batch, config.max_grad_norm
                    )
                log.micro_batch(batch, loss)
                if accelerator.sync_gradients:
                    global_step += 1
                    log.update(global_step, num_items_in_batch, scheduler.get_last_lr()[0], grad_norm)
                if global_step == num_steps:
                    break
            sampler.set_epoch(sampler.epoch + 1)

        log.evaluation(global_step, evaluate(accelerator, model, processor, eval_dataset), eval_dataset)
        save_trained(accelerator, model, processor, Path(config.output_dir))
        return log.finish(global_step)


def build_accelerator(config: StepConfig, project_dir: str | None = None) -> Accelerator:
    """The strategy is the launch config's; precision and accumulation are the flags'. `project_dir` takes the logs."""
    on_cpu = not torch.cuda.is_available()
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    accelerator = Accelerator(
        cpu=on_cpu and not uses_deepspeed,  # DeepSpeed finds the CPU itself; this flag would switch it off
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with="tensorboard" if project_dir else None,
        project_dir=project_dir,
        # The sampler has made the processes' shares even; accelerate's way would repeat samples.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        # Without a GPU DeepSpeed would ask for a backend of its own and count one process.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and uses_deepspeed else [],
    )
    if uses_deepspeed:
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
        deepspeed_config["gradient_clipping"] = config.max_grad_norm  # the engine clips, accelerator cannot
    return accelerator


def build_datasets(
    config: TrainConfig, processor: ProcessorMixin
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The samples to train on, and those to evaluate on where there are any."""
    train_path, eval_path, image_folder = config.dataset, config.eval_dataset, config.image_folder
    if train_path is None:
        demo = ensure_demo()
        train_path, eval_path = demo / "train.json", eval_path or demo / "validation.json"

    train_dataset = open_dataset(train_path, image_folder)
    records = measure_lengths(train_dataset.records, processor, config.max_seq_len)
    fitting = np.flatnonzero(column_values(records, "num_label_tokens"))
    if len(fitting) == 0:
        raise UserError(f"--max_seq_len {config.max_seq_len}: no sample of {train_path} fits, choose a larger one")
    if len(fitting) < len(records):
        num_dropped = len(records) - len(fitting)
        PartialState().print(f"Left out {num_dropped} of {len(records)} samples: longer than {config.max_seq_len}")
    train_dataset.records = records.select(fitting)

    if eval_path is None or config.eval_samples == 0:
        return train_dataset, None
    eval_dataset = open_dataset(eval_path, image_folder)
    eval_dataset.records = eval_dataset.records.shuffle(seed=0).select(
        range(min(config.eval_samples, len(eval_dataset)))
    )
    return train_dataset, eval_dataset


def build_model(config: StepConfig, is_deepspeed: bool) -> nn.Module:
    """LoRA on the language model, the trainable modules in full, the rest frozen in the compute dtype.

    What is trained is held in fp32; DeepSpeed keeps fp32 masters of its own and wants one dtype in the module.
    """
    model = load_model(config.model, MIXED_PRECISIONS[config.mixed_precision], config.attn_implementation)
    model.chunked_loss = config.loss == "chunked"
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    check_modules(model, "trainable_modules", config.modules_trained_in_full)
    check_modules(model.model.language_model, "lora_target_modules", config.lora_target_modules)
    model.requires_grad_(False)
    if config.lora_r:
        set_seed(config.seed)  # the same adapter, whatever was drawn while loading
        model = get_peft_model(model, lora_config(config))
    else:
        for module in select_modules(model, config.modules_trained_in_full):
            module.requires_grad_(True)
    tile_frozen_mlps(model, config.mlp_tiles)
    if not is_deepspeed:
        for parameter in trained_parameters(model):
            parameter.data = parameter.data.float()
    return model


def lora_config(config: StepConfig) -> LoraConfig:
    """LoRA on the language model alone: PEFT matches names by their end, and CLIP has a q_proj too."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.lora_bias,
        target_modules=rf".*\blanguage_model\..*\.({'|'.join(map(re.escape, config.lora_target_modules))})",
        modules_to_save=config.modules_trained_in_full,
        task_type="CAUSAL_LM",
    )


def check_modules(model: nn.Module, flag: str, names: list[str]) -> None:
    """Raise UserError for a name that ends no module's path."""
    for name in names:
        if not select_modules(model, [name]):
            known = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if path})
            choices = [path for path in known if not path.isdecimal()]
            raise UserError(f"--{flag} {name}: {type(model).__name__} has no such module, only {', '.join(choices)}")


def select_modules(model: nn.Module, names: list[str]) -> list[nn.Module]:
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(
    model: nn.Module, optim: str, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    return OPTIMIZERS[optim](trained_parameters(model), lr=learning_rate, weight_decay=weight_decay)


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: dict[str, torch.Tensor],
    num_items_in_batch: int,
    max_grad_norm: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One micro-batch forward and backward, and at the end of an update the optimizer's step.

    Returns the micro-batch's share of the update's loss (the sum over its label tokens / `num_items_in_batch`, the
    label tokens of all micro-batches and processes), and at the end of an update the gradients' norm before clipping.
    """
    loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
    # The engine takes the mean over micro-batches and processes; the shares are to be added up.
    accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
    grad_norm = None
    if accelerator.sync_gradients:
        grad_norm = accelerator.clip_grad_norm_(trained_parameters(model), max_grad_norm or math.inf)
    optimizer.step()
    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
        scheduler.step()
    optimizer.zero_grad()
    return loss.detach(), grad_norm


if __name__ == "__main__":
    run_script(main, TrainConfig)
