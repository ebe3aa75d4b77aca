"""Fine-tune a vision-language model with LoRA on a small GPU. The launch config chooses the strategy, flags the rest:

    accelerate launch --config_file accelerate_configs/zero3.yaml train.py
    accelerate launch --config_file accelerate_configs/zero3.yaml train.py --recipe recipes/mgm_2b_stage2.yaml

Without arguments it fine-tunes the embedded tiny model on the embedded demo, with the flags of recipes/demo.yaml. The
last line on stdout is a JSON object.
"""

import math
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import quiet  # noqa: F401 (before PEFT)

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs, PartialState
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import ProcessorMixin, get_scheduler

from checkpoints import (
    RUN_JSON,
    Checkpoints,
    Position,
    check_output_dir,
    find_checkpoint,
    finished_run,
    read_position,
    run_settings,
)
from data.batching import column_values, count_cut, measure_lengths
from data.dataset import ConversationDataset, digest_records, open_dataset
from data.images import MOVED
from data.loader import build_loader
from data.make_demo import ensure_demo
from data.turn_ends import missing_turn_end
from doctor import run_doctor
from eval import HeldOut, evaluate
from faults import BadSamples, NonFiniteUpdates, Watch, check_bad_fraction, name_some
from gated_mlp import recompute_activations
from out_of_memory import OutOfMemory
from quantization import LANGUAGE_LAYERS, QUANTIZATIONS, is_quantized
from rehearsal import rehearse
from run_log import RunLog
from saving import save_trained
from tiled_mlp import tile_frozen_mlps
from training_state import TrainingState
from utils import (
    MIXED_PRECISIONS,
    ModelConfig,
    UserError,
    check_choice,
    check_minimum,
    load_config,
    load_model,
    load_processor,
    run_script,
)


VISION_LANGUAGE_MODULES = ["multi_modal_projector", "patch_info_mining"]
LANGUAGE_MODULES = ["language_model", "lm_head"]
MAX_NAMED_RECORDS = 100  # that are left out; data.check names them all
DEMO_RECIPE = Path(__file__).parent / "recipes/demo.yaml"
# transformers' schedulers but those that need more settings than these flags have, such as a smallest learning rate.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
POLYNOMIAL_END = 1e-7  # transformers' `lr_end`: the learning rate has to begin above it
ALL_LINEAR = "all-linear"  # PEFT's word
OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}  # transformers' names


@dataclass(kw_only=True)
class StepConfig(ModelConfig):
    """What a training step is made of: the flags that train.py and memory_probe.py share."""

    lora_r: int = field(default=16, metadata={"help": "rank; 0: no adapter, full fine-tuning"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by alpha / r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "of the adapter's inputs"})
    lora_bias: str = field(default="none", metadata={"help": "none | all | lora_only"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "o_proj"],
        metadata={"help": "linear layers of the language model, by name, or all-linear"},
    )
    use_dora: bool = field(default=False, metadata={"help": "train the rows' lengths apart (arXiv:2402.09353)"})
    use_rslora: bool = field(default=False, metadata={"help": "scaled by alpha / sqrt(r) instead (arXiv:2312.03732)"})
    quantize: str = field(
        default="none", metadata={"help": "none | nf4: the frozen language model in 4 bits, by bitsandbytes"}
    )
    trainable_modules: list[str] | None = field(
        default=None,
        metadata={"help": "trained in full; default projector and mining, with --lora_r 0 the language model too"},
    )
    loss: str = field(
        default="chunked", metadata={"help": "chunked: never the logits of all tokens at once | full: the reference"}
    )
    max_seq_len: int = field(default=2048, metadata={"help": "tokens a row, image positions counted"})
    packing: bool = field(default=False, metadata={"help": "rows of several samples, which do not see each other"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows of a micro-batch"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "held-out questions answered at once"})
    eval_samples: int = field(default=256, metadata={"help": "held-out samples to answer, before and after; 0: none"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches of an update"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations in the backward pass"})
    checkpoint_every_n_layers: int = field(default=1, metadata={"help": "2: every other layer alone"})
    mlp_tiles: int = field(default=4, metadata={"help": "a checkpointed layer's frozen MLP runs in pieces; 1: whole"})
    optim: str = field(default="adamw_torch", metadata={"help": " | ".join(OPTIMIZERS)})
    max_grad_norm: float = field(default=1.0, metadata={"help": "0: no clipping"})
    seed: int = field(default=42, metadata={"help": "of the adapter's start, the order of samples, and dropout"})
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that open images ahead of the step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        check_choice("optim", self.optim, tuple(OPTIMIZERS))
        check_choice("quantize", self.quantize, QUANTIZATIONS)
        check_choice("loss", self.loss, ("chunked", "full"))
        check_minimum(self, lora_r=0, lora_alpha=1, lora_dropout=0, max_seq_len=1, per_device_train_batch_size=1)
        check_minimum(self, per_device_eval_batch_size=1, eval_samples=0)
        check_minimum(self, gradient_accumulation_steps=1, mlp_tiles=1, checkpoint_every_n_layers=1, max_grad_norm=0)
        check_minimum(self, dataloader_num_workers=0, seed=0)
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: it must be below 2**32")  # NumPy's limit
        if self.packing and self.attn_implementation == "flash_attention_2" and self.per_device_train_batch_size > 1:
            # It finds packed samples in a single row alone; in several they would see each other.
            raise UserError("--packing with flash_attention_2: choose --per_device_train_batch_size 1 or sdpa")
        if self.checkpoint_every_n_layers > 1 and not self.gradient_checkpointing:
            raise UserError(
                f"--checkpoint_every_n_layers {self.checkpoint_every_n_layers}: nothing is checkpointed with "
                "--no_gradient_checkpointing, leave one of them out"
            )
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: it must be below 1")
        if ALL_LINEAR in self.lora_target_modules and len(self.lora_target_modules) > 1:
            others = " ".join(name for name in self.lora_target_modules if name != ALL_LINEAR)
            raise UserError(f"--lora_target_modules {ALL_LINEAR}: it stands alone, leave out {others}")
        needs_adapter = {"use_dora": self.use_dora, "use_rslora": self.use_rslora, "quantize": self.quantize != "none"}
        for name in [name for name, is_set in needs_adapter.items() if is_set and not self.lora_r]:
            raise UserError(f"--{name} {getattr(self, name)}: --lora_r 0 trains no adapter, choose a rank above 0")

    @property
    def modules_trained_in_full(self) -> list[str]:
        """`trainable_modules`, or its default, which depends on the rank."""
        if self.trainable_modules is not None:
            return self.trainable_modules
        return VISION_LANGUAGE_MODULES + ([] if self.lora_r else LANGUAGE_MODULES)

    @property
    def step_flags(self) -> dict[str, Any]:
        """The flags of this class alone, which memory_probe.py takes as they are."""
        return {flag.name: getattr(self, flag.name) for flag in fields(StepConfig)}


@dataclass(kw_only=True)
class TrainConfig(StepConfig):
    # Data
    dataset: str | None = field(
        default=None,
        metadata={"help": ".json, .jsonl, .parquet, folder or hub id; without it the demo, with recipes/demo.yaml"},
    )
    image_folder: str | None = field(default=None, metadata={"help": "default: the folder of the data set"})
    follow_links: bool = field(default=False, metadata={"help": "allow links out of the image folder"})
    eval_dataset: str | None = field(default=None, metadata={"help": "held-out data; the demo's for the demo"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "of a held-out answer; default: as many as the longest held-out reply has"}
    )
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "pad | square; default: as the model's processor"}
    )
    group_by_length: bool = field(default=False, metadata={"help": "updates of similar lengths: less padding"})
    allow_missing_end_of_turn: bool = field(
        default=False, metadata={"help": "train even if no token that stops generation ends the replies"}
    )
    on_bad_sample: str = field(default="error", metadata={"help": "error | skip: leave it out and say so"})
    max_bad_fraction: float = field(default=0.01, metadata={"help": "of the data set: with more to skip the run ends"})
    # The course of training
    learning_rate: float = field(default=2e-4, metadata={"help": "the highest, after the warm-up"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the updates"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": " | ".join(SCHEDULERS)})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    num_train_epochs: int = field(default=1, metadata={"help": "passes over the data set"})
    max_steps: int = field(default=-1, metadata={"help": "updates; overrides num_train_epochs where positive"})
    # Output
    doctor: bool = field(default=False, metadata={"help": "only look whether this machine is ready for --model"})
    output_dir: str = field(default="outputs/demo", metadata={"help": "folder for adapter, checkpoints and logs"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the run that is in --output_dir"})
    logging_steps: int = field(default=10, metadata={"help": "updates from one point in TensorBoard to the next"})
    save_steps: int = field(default=100, metadata={"help": "updates from one checkpoint to the next; 0: none"})
    save_total_limit: int = field(default=2, metadata={"help": "the newest checkpoints are kept; 0: all"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint's folder, or latest"})
    forecast: bool = field(
        default=True, metadata={"help": "predict the run's memory in a process beside it, to compare with"}
    )
    rehearse: bool = field(default=True, metadata={"help": "run the largest step once, unseen, before the first"})
    max_nonfinite_updates: int = field(
        default=5, metadata={"help": "the run ends when so many in a row were skipped because of NaN or Inf; 0: never"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_aspect_ratio is not None:
            check_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "square"))
        check_choice("on_bad_sample", self.on_bad_sample, ("error", "skip"))
        check_minimum(self, max_bad_fraction=0)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        check_minimum(self, learning_rate=0, warmup_ratio=0, weight_decay=0, num_train_epochs=1, max_steps=-1)
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: it is a share of the updates, at most 1")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate {self.learning_rate}: polynomial falls to {POLYNOMIAL_END}, start above it"
            )
        check_minimum(self, logging_steps=1, max_new_tokens=1)
        check_minimum(self, save_steps=0, save_total_limit=0, max_nonfinite_updates=0)
        if not self.doctor and Path(self.model).resolve() == Path(self.output_dir).resolve():
            raise UserError(f"--output_dir {self.output_dir}: the model is there, choose another folder")

    @staticmethod
    def default_recipe(flags: Namespace) -> Path | None:
        """Without a data set the demo is trained on, and the demo has its own batch and learning rate."""
        return DEMO_RECIPE if flags.dataset is None else None


def main(config: TrainConfig) -> dict | None:
    output_dir = Path(config.output_dir)
    if config.doctor:
        return run_doctor(config.model, output_dir)
    check_output_dir(output_dir, config.overwrite_output_dir, config.resume_from_checkpoint)
    accelerator = build_accelerator(config, config.output_dir)
    check_positions(config)
    processor = build_processor(config)
    set_seed(config.seed)

    # Whatever is wrong with the input is found here, before the first byte is written.
    with accelerator.main_process_first():
        train_dataset, eval_dataset = build_datasets(config, processor)
    run_json, data = output_dir / RUN_JSON, train_dataset.digest
    if finished := finished_run(config.resume_from_checkpoint, run_json, asdict(config), data):
        accelerator.print(f"{output_dir} is finished already")
        return finished if accelerator.is_main_process else None
    if config.dataset is None:
        accelerator.print(f"No --dataset: training on the demo with recipes/{DEMO_RECIPE.name}")
    model = build_model(config, accelerator.state.deepspeed_plugin is not None, report=accelerator.print)

    held_out = HeldOut.of(
        eval_dataset,
        processor,
        config.per_device_eval_batch_size,
        config.max_new_tokens,
        positions=num_positions(config.model),
    )
    loader, sampler, longest = build_loader(config, train_dataset, processor, model.config, accelerator.num_processes)
    if config.packing:
        accelerator.print(f"Packed {len(train_dataset)} samples into {len(loader.dataset)} rows")
    optimizer = build_optimizer(model, config.optim, config.learning_rate, config.weight_decay)
    num_steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * sampler.num_updates()
    scheduler = build_scheduler(config, optimizer, num_steps)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    state = TrainingState(accelerator, model, optimizer, scheduler)
    settings = run_settings(
        asdict(config),
        data=data,
        lengths=sampler.digest(),
        samples_per_update=sampler.update_size,
        updates=num_steps,
        trained=state.shapes(),
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir, settings, accelerator.print)
    position = read_position(checkpoint)

    with (
        Watch(accelerator) as watch,
        OutOfMemory(accelerator, config, longest) as out_of_memory,
        RunLog(accelerator, config, model, optimizer, num_steps, longest, position.global_step) as log,
        Checkpoints(accelerator, config, state, log, settings) as saver,
    ):
        log.num_cut_replies = train_dataset.num_cut
        model.train()
        if config.rehearse:
            rehearse(accelerator, model, state, config, longest, held_out.longest, announce=out_of_memory.at)
        if checkpoint is None:
            out_of_memory.at(held_out.when, held_out.longest)
            log.evaluation(0, evaluate(accelerator, model, processor, held_out), eval_dataset)
        else:
            saver.resume(checkpoint)
        clear_device_cache()  # what loading and answering have left behind
        log.start()
        global_step = position.global_step
        sampler.start_at(position.epoch, position.update)
        nonfinite = NonFiniteUpdates(accelerator, config.max_nonfinite_updates)
        bad_samples = BadSamples(watch, log, train_dataset, config.max_bad_fraction)
        while global_step < num_steps:
            label_tokens = sampler.label_tokens_per_update()
            first_step = global_step - sampler.first_update
            for batch in watch.batches(loader):
                out_of_memory.at(f"in step {global_step + 1}")
                sample_ids = batch.pop("sample_ids")
                num_items_in_batch = bad_samples.count(batch, label_tokens[global_step - first_step])
                with accelerator.accumulate(model):
                    loss, grad_norm = training_step(
                        accelerator, model, optimizer, scheduler, batch, num_items_in_batch, config.max_grad_norm, True
                    )
                log.micro_batch(batch, loss)
                nonfinite.micro_batch(loss, sample_ids)
                if accelerator.sync_gradients:
                    global_step += 1
                    loss_scale = state.loss_scale()
                    is_skipped = nonfinite.update(global_step, grad_norm, loss_scale)
                    learning_rate = scheduler.get_last_lr()[0]
                    log.update(global_step, num_items_in_batch, learning_rate, grad_norm, loss_scale, is_skipped)
                    saver.update(Position(global_step, sampler.epoch, global_step - first_step), is_skipped)
                if global_step == num_steps:
                    break
            sampler.start_at(sampler.epoch + 1)

        out_of_memory.at("while saving")
        save_trained(accelerator, model, processor, output_dir)
        clear_device_cache()  # what training has left behind
        with noting_what_is_saved(output_dir):
            out_of_memory.at(held_out.when, held_out.longest)
            log.evaluation(global_step, evaluate(accelerator, model, processor, held_out), eval_dataset)
        return log.finish(global_step, data)


@contextmanager
def noting_what_is_saved(output_dir: Path) -> Iterator[None]:
    """Whatever fails inside, what was trained is not lost, and the error says so."""
    try:
        yield
    except Exception as error:
        error.add_note(f"What was trained is saved in {output_dir}")
        raise


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
        # NaN in a gradient skips the step; in bf16 stage 2 looks for it only when told to.
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
        deepspeed_config["gradient_clipping"] = config.max_grad_norm  # the engine clips, accelerator cannot
        deepspeed_config.setdefault("bf16", {})["check_grad_overflow"] = True
    return accelerator


def build_processor(config: TrainConfig) -> ProcessorMixin:
    """The model's processor. `--image_aspect_ratio` changes it for the whole run, and it is saved like that."""
    processor = load_processor(config.model)
    if config.image_aspect_ratio is None:
        config.image_aspect_ratio = processor.image_aspect_ratio  # so that run.json tells it
    processor.image_aspect_ratio = config.image_aspect_ratio
    return processor


def num_positions(model: str) -> float:
    """Tokens that a row of the language model may have; infinity where its config names no limit."""
    text_config = load_config(model).get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or math.inf


def check_positions(config: StepConfig) -> None:
    """Raise UserError where rows may be longer than the language model has positions for."""
    positions = num_positions(config.model)
    if config.max_seq_len > positions:
        raise UserError(
            f"--max_seq_len {config.max_seq_len}: the language model of {config.model} has {positions} positions "
            f"(max_position_embeddings); choose --max_seq_len {positions} or less"
        )


def build_datasets(
    config: TrainConfig, processor: ProcessorMixin
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The samples to train on, and those to evaluate on where there are any."""
    train_path, eval_path, image_folder = config.dataset, config.eval_dataset, config.image_folder
    if train_path is None:
        demo = ensure_demo()
        train_path, eval_path = demo / "train.json", eval_path or demo / "validation.json"

    skips_bad, follow_links = config.on_bad_sample == "skip", config.follow_links
    train_dataset = open_dataset(train_path, image_folder, skips_bad, follow_links)
    report_left_out(train_dataset, config.max_bad_fraction)
    if train_dataset.num_moved:
        PartialState().print(f"{train_dataset.num_moved:,} {MOVED}")
    check_turn_ends(config, processor, train_dataset)
    records = measure_lengths(train_dataset.records, processor, config.max_seq_len)
    fitting = np.flatnonzero(column_values(records, "num_label_tokens"))
    if len(fitting) == 0:
        raise UserError(f"--max_seq_len {config.max_seq_len}: no sample of {train_path} fits, choose a larger one")
    if len(fitting) < len(records):
        num_dropped = len(records) - len(fitting)
        PartialState().print(f"Left out {num_dropped} of {len(records)} samples: longer than {config.max_seq_len}")
    train_dataset.num_cut = count_cut(records, config.max_seq_len)
    if train_dataset.num_cut:
        cut = f"Cut {train_dataset.num_cut} of {len(records)} samples at --max_seq_len {config.max_seq_len}"
        PartialState().print(f"{cut}: the end of their replies, with the end of turn, is not learned")
    train_dataset.digest = digest_records(records)
    train_dataset.records = records.select(fitting)

    if eval_path is None or config.eval_samples == 0:
        return train_dataset, None
    eval_dataset = open_dataset(eval_path, image_folder, follow_links=follow_links)
    eval_dataset.records = eval_dataset.records.shuffle(seed=0).select(
        range(min(config.eval_samples, len(eval_dataset)))
    )
    return train_dataset, eval_dataset


def check_turn_ends(config: TrainConfig, processor: ProcessorMixin, dataset: ConversationDataset) -> None:
    """Raise UserError, or warn where the flag allows it, if the model would not learn to end its turn."""
    problem = missing_turn_end(config.model, processor, dataset.records[0])
    if problem and not config.allow_missing_end_of_turn:
        raise UserError(f"{problem}. Mend the template, or give --allow_missing_end_of_turn")
    if problem:
        PartialState().print(f"warning: {problem}", file=sys.stderr)


def report_left_out(dataset: ConversationDataset, max_bad_fraction: float) -> None:
    """Name the records that are skipped. Raises UserError where they are too many."""
    problems = list(dataset.problems.values())
    for problem in problems[:MAX_NAMED_RECORDS]:
        PartialState().print(f"warning: left out: {problem}", file=sys.stderr)
    if len(problems) > MAX_NAMED_RECORDS:
        PartialState().print(f"warning: left out: {len(problems) - MAX_NAMED_RECORDS} more", file=sys.stderr)
    check_bad_fraction(len(problems), len(dataset) + len(problems), max_bad_fraction)


def build_model(
    config: StepConfig, is_deepspeed: bool, report: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """LoRA on the language model, the trainable modules in full, the rest frozen in the compute dtype.

    What is trained is held in fp32; DeepSpeed keeps fp32 masters of its own and wants one dtype in the module.
    `report` is told what is trained in full, and what is not although it was asked for.
    """
    if is_deepspeed and config.use_dora and config.quantize != "none":
        raise UserError("--use_dora true: not with 4-bit weights under DeepSpeed, choose single.yaml or ddp.yaml")
    dtype = MIXED_PRECISIONS[config.mixed_precision]
    model = load_model(config.model, dtype, config.attn_implementation, config.quantize)
    model.chunked_loss = config.loss == "chunked"
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=config.checkpoint_every_n_layers
        )
    modules = select_modules(model, config.modules_trained_in_full)
    targets = lora_targets(config, getattr(model.model, "language_model", model.model))
    model.requires_grad_(False)
    if config.lora_r:
        check_beside_lora(model, modules, targets, config.modules_trained_in_full)
        set_seed(config.seed)  # the same adapter, whatever was drawn while loading
        model = get_peft_model(model, lora_config(config, targets, list(modules)))
    else:
        for module in modules.values():
            module.requires_grad_(True)
    unused = freeze_unused(model)
    if trained := [path for path in modules if path not in unused]:
        report(f"Trained in full: {name_some(trained)}")
    if unused:
        report(f"Not trained, because the loss does not depend on it: {name_some(unused)}")
    if not trained_parameters(model):
        raise UserError(f"--trainable_modules {' '.join(config.modules_trained_in_full)}: nothing is left to train")
    tile_frozen_mlps(model, config.mlp_tiles)
    recompute_activations(model)
    if not is_deepspeed:
        for parameter in trained_parameters(model):
            parameter.data = parameter.data.float()
    return model


def lora_targets(config: StepConfig, language_model: nn.Module) -> list[str]:
    """The names of the layers that get an adapter. Raises UserError for one that is no linear layer's."""
    modules = language_model.named_modules()
    known = sorted({path.rpartition(".")[2] for path, module in modules if isinstance(module, nn.Linear)})
    if config.lora_target_modules == [ALL_LINEAR]:
        return known
    for name in config.lora_target_modules:
        if name not in known:
            choices = f"{', '.join(known)} or {ALL_LINEAR}"
            raise UserError(
                f"--lora_target_modules {name}: {type(language_model).__name__} has no such layer, choose {choices}"
            )
    return config.lora_target_modules


def lora_config(config: StepConfig, targets: list[str], modules: list[str]) -> LoraConfig:
    """LoRA on the language model alone, and `modules`, by whole paths, in full: PEFT matches names by their end, and
    CLIP has a q_proj too."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.lora_bias,
        target_modules=lora_pattern(targets),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=modules,
        task_type="CAUSAL_LM",
    )


def lora_pattern(targets: list[str]) -> str:
    return rf"{LANGUAGE_LAYERS}\..*\.({'|'.join(map(re.escape, targets))})"


def select_modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules to train in full, by path: those whose path ends with one of the names.

    A module inside another one belongs to it, and a list of modules is its members: it runs nothing itself, and PEFT
    does not take it. Raises UserError for a name that ends no path, or a module that cannot be trained.
    """
    having_weights = {p: module for p, module in model.named_modules() if p and list(module.parameters())}
    found = {}
    for name in names:
        matching = {p: module for p, module in having_weights.items() if f".{p}".endswith(f".{name}")}
        if not matching:
            known = sorted({path.rpartition(".")[2] for path in having_weights})
            choices = ", ".join(path for path in known if not path.isdecimal())
            raise UserError(f"--trainable_modules {name}: {type(model).__name__} has no such module, only {choices}")
        if any(is_quantized(module) for module in matching.values()):
            raise UserError(f"--trainable_modules {name}: 4-bit weights stay as they are, leave out --quantize")
        for path, module in matching.items():
            members = module.named_children() if isinstance(module, nn.ModuleList) else []
            found |= {f"{path}.{key}": member for key, member in members} or {path: module}
    return {path: module for path, module in found.items() if not any(path.startswith(f"{p}.") for p in found)}


def check_beside_lora(model: nn.Module, modules: dict[str, nn.Module], targets: list[str], names: list[str]) -> None:
    """Raise UserError for one of the `modules`, chosen by `names`, that LoRA trains too, or whose copy has no place.

    PEFT trains a copy of each module. The copy of a head that shares its weight with the embedding would be a second
    weight, and a checkpoint of such a model has room for one.
    """
    pattern = re.compile(lora_pattern(targets))
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in modules.items():
        inside = next((p for p, _ in module.named_modules(prefix=path) if pattern.fullmatch(p)), None)
        own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        problem = None
        if inside is not None:
            problem = f"{path} has LoRA in it, {inside}"
        elif any(uses[key] > count for key, count in own.items()):
            problem = f"{path} shares its weight with another module, and a copy of it would not"
        if problem is not None:
            raise UserError(f"--trainable_modules {' '.join(names)}: {problem}: leave it out or choose --lora_r 0")


def freeze_unused(model: nn.Module) -> list[str]:
    """Train nothing that cannot get a gradient: DDP would wait for it. Returns the paths of what is not trained."""
    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # the copy runs; --lora_bias all has reached the original too
                module.original_module.requires_grad_(False)
    unused = getattr(base.model, "unused_modules", list)()
    paths = {id(module): path for path, module in base.named_modules()}
    found = [module for module in unused if trained_parameters(module)]
    for module in found:
        module.requires_grad_(False)
    return [paths[id(module)].replace(".modules_to_save.default", "") for module in found]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(
    model: nn.Module, optim: str, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    return OPTIMIZERS[optim](trained_parameters(model), lr=learning_rate, weight_decay=weight_decay)


def build_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    # Polynomial divides by the number of steps after the warm-up.
    num_warmup_steps = min(round(config.warmup_ratio * num_steps), num_steps - 1)
    return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: dict[str, torch.Tensor],
    num_items_in_batch: int,
    max_grad_norm: float,
    skip_nonfinite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """One micro-batch forward and backward, and at the end of an update the optimizer's step.

    Returns the micro-batch's share of the update's loss (the sum over its label tokens / `num_items_in_batch`, the
    label tokens of all micro-batches and processes), and at the end of an update the gradients' norm before clipping.
    `skip_nonfinite`: a NaN or infinite norm leaves parameters and optimizer alone; the norm is a float then, and a GPU
    is waited for once an update. DeepSpeed's engine and a loss scaler skip by themselves.
    """
    loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
    # The engine takes the mean over micro-batches and processes; the shares are to be added up.
    accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
    grad_norm = None
    if accelerator.sync_gradients:
        grad_norm = accelerator.clip_grad_norm_(trained_parameters(model), max_grad_norm or math.inf)
        grad_norm = float(grad_norm) if skip_nonfinite else grad_norm
    is_skipped = skip_nonfinite and grad_norm is not None and not math.isfinite(grad_norm)
    if not is_skipped or accelerator.scaler is not None:  # a scaler lowers its scale in a step that it skips
        optimizer.step()
    if accelerator.sync_gradients and not is_skipped and not accelerator.optimizer_step_was_skipped:
        scheduler.step()
    optimizer.zero_grad()
    return loss.detach(), grad_norm


if __name__ == "__main__":
    result = run_script(main, TrainConfig)
    sys.exit(2 if result and result["status"] == "problem" else 0)
