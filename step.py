"""The one training step: train.py runs it, memory_probe.py predicts and measures it."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import quiet  # noqa: F401 (before PEFT)

import torch
from accelerate import Accelerator, AutocastKwargs, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, KwargsHandler, set_seed
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from layers.checkpoint import checkpoint_mlps, checkpoint_with_less_work
from layers.fused_lora import fuse_lora
from layers.fused_norm import fuse_norms
from layers.fused_rotary import fuse_rotary
from layers.gated_mlp import fuse_gated_mlps
from layers.model_loss import use_model_loss
from layers.quantization import QUANTIZATIONS
from layers.tiled_mlp import tile_frozen_mlps
from models.checkpointing import checkpoint_layers, keep_frozen_towers_in_eval, without_input_gradients
from models.config import MIXED_PRECISIONS, ModelConfig
from models.family import family_of, has_router_loss, packs, reads_padding_mask
from models.fsdp2 import fsdp2_plugin, prepare_sharded, use_on_cpu, whole
from models.loading import load_config, load_model, num_decoder_layers, num_positions
from models.lora import (
    ALL_LINEAR,
    check_beside_lora,
    default_modules,
    freeze_unused,
    is_transposed,
    lora_pattern,
    report_layers_without_lora,
    select_modules,
    takes_names_alone,
    trained_parameters,
)
from models.parts import language_model
from models.zero3_leaves import gather_layers_whole
from utils import UserError, check_choice, check_minimum, flag, free_on_resume, name_some


OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}  # transformers' names
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(kw_only=True)
class StepConfig(ModelConfig):
    """What a training step is made of: the flags that train.py and memory_probe.py share."""

    lora_r: int = flag(16, "the adapter's rank; 0: no adapter, full fine-tuning")
    lora_alpha: int = flag(32, "the adapter is scaled by alpha / r")
    lora_dropout: float = flag(0.1, "dropout of the adapter's inputs, a share below 1")
    lora_bias: str = flag("none", "the biases to train: none | all | lora_only")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "o_proj"],
        metadata={"help": "linear layers of the language model that get LoRA, by name, or all-linear"},
    )
    lora_vision_tower: bool = flag(False, "LoRA also on the vision tower's linear layers of those names")
    use_dora: bool = flag(False, "DoRA: train the weights' magnitudes separately (arXiv:2402.09353)")
    use_rslora: bool = flag(False, "scale the adapter by alpha / sqrt(r) instead (arXiv:2312.03732)")
    quantize: str = flag("none", "none | nf4: the frozen language model in 4 bits, by bitsandbytes")
    trainable_modules: list[str] | None = flag(
        None,
        "modules to train in full; default: the family's (MGM: projector, mining), with --lora_r 0 the language model",
    )
    loss: str = free_on_resume("chunked", "chunked: logits of some tokens at a time | full: of all tokens at once")
    max_seq_len: int = flag(2048, "the longest row, in tokens, image positions included")
    max_image_pixels: int = flag(0, "shrink larger images to so many pixels, aspect kept; 0: as the processor does")
    packing: bool = flag(False, "put several samples into a row; they do not attend to each other")
    per_device_train_batch_size: int = free_on_resume(1, "rows of a micro-batch on each device")
    per_device_eval_batch_size: int = free_on_resume(1, "held-out questions that each device answers at once")
    eval_samples: int = free_on_resume(256, "held-out samples to answer before and after training; 0: none")
    gradient_accumulation_steps: int = free_on_resume(1, "micro-batches of an update, which is one optimizer step")
    gradient_checkpointing: bool = free_on_resume(True, "recompute activations in the backward pass")
    checkpoint_num_layers: int | None = free_on_resume(None, "decoder layers to recompute whole; default: all")
    checkpoint_num_mlps: int = free_on_resume(0, "other decoder layers that recompute their MLP alone")
    mlp_tiles: int = free_on_resume(
        0, "tiles in which a recomputed, frozen MLP runs; 1: all tokens at once; 0: as many as long rows need"
    )
    optim: str = flag("adamw_torch", " | ".join(OPTIMIZERS))
    max_grad_norm: float = flag(1.0, "clip the gradients to this norm; 0: no clipping")
    seed: int = flag(42, "for the adapter's first weights, the order of samples, and dropout")
    dataloader_num_workers: int = free_on_resume(2, "processes that open images ahead of the step")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        check_choice("optim", self.optim, tuple(OPTIMIZERS))
        check_choice("quantize", self.quantize, QUANTIZATIONS)
        check_choice("loss", self.loss, ("chunked", "full"))
        check_minimum(self, lora_r=0, lora_alpha=1, lora_dropout=0, max_seq_len=1, per_device_train_batch_size=1)
        check_minimum(self, per_device_eval_batch_size=1, eval_samples=0)
        check_minimum(self, gradient_accumulation_steps=1, mlp_tiles=0, max_grad_norm=0)
        check_minimum(self, checkpoint_num_layers=0, checkpoint_num_mlps=0)
        check_minimum(self, max_image_pixels=0, dataloader_num_workers=0, seed=0)
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: it must be below 2**32")  # NumPy's limit
        if self.packing and self.attn_implementation == "flash_attention_2" and self.per_device_train_batch_size > 1:
            # It finds packed samples in a single row alone; in several they would see each other.
            raise UserError("--packing with flash_attention_2: choose --per_device_train_batch_size 1 or sdpa")
        checkpointing = {"checkpoint_num_layers": self.checkpoint_num_layers is not None}
        checkpointing["checkpoint_num_mlps"] = self.checkpoint_num_mlps > 0
        for name in [name for name, is_set in checkpointing.items() if is_set and not self.gradient_checkpointing]:
            raise UserError(
                f"--{name} {getattr(self, name)}: nothing is checkpointed with --no_gradient_checkpointing, "
                "leave one of them out"
            )
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: it must be below 1")
        if ALL_LINEAR in self.lora_target_modules and len(self.lora_target_modules) > 1:
            others = " ".join(name for name in self.lora_target_modules if name != ALL_LINEAR)
            raise UserError(f"--lora_target_modules {ALL_LINEAR}: it stands alone, leave out {others}")
        needs_adapter = {name: getattr(self, name) for name in ("use_dora", "use_rslora", "lora_vision_tower")}
        needs_adapter["quantize"] = self.quantize != "none"
        for name in [name for name, is_set in needs_adapter.items() if is_set and not self.lora_r]:
            raise UserError(f"--{name} {getattr(self, name)}: --lora_r 0 trains no adapter, choose a rank above 0")

    @property
    def step_flags(self) -> dict[str, Any]:
        """The flags of this class alone, which memory_probe.py takes as they are."""
        return {each.name: getattr(self, each.name) for each in fields(StepConfig)}


def build_accelerator(
    mixed_precision: str,
    micro_batch_size: int,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 0.0,
    project_dir: str | None = None,
) -> Accelerator:
    """The strategy is the launch config's, the rest the flags'. `project_dir` takes TensorBoard's logs."""
    on_cpu = not torch.cuda.is_available()
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    plugin = fsdp2_plugin()
    # Without a GPU DeepSpeed would ask for a backend of its own and count one process. The time-out is long because
    # all wait for the one that prepares the data; train.py sees by itself that one is gone.
    backend = "gloo" if on_cpu and uses_deepspeed else "nccl"
    handlers: list[KwargsHandler] = [InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)]
    if plugin is not None:  # casts of gathered weights would be kept for the whole forward pass
        handlers.append(AutocastKwargs(cache_enabled=False))
    accelerator = Accelerator(
        cpu=on_cpu and not uses_deepspeed,  # DeepSpeed finds the CPU itself; this flag would switch it off
        mixed_precision=mixed_precision,
        # FSDP would keep whole gradients between micro-batches; it does not, if each of them is reduced.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            gradient_accumulation_steps, sync_each_batch=plugin is not None
        ),
        log_with="tensorboard" if project_dir else None,
        project_dir=project_dir,
        # The sampler has made the processes' shares even; accelerate's way would repeat samples.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        kwargs_handlers=handlers,
        fsdp_plugin=plugin,
    )
    if plugin is not None and on_cpu:
        use_on_cpu(accelerator, plugin)
    if uses_deepspeed:
        # NaN in a gradient skips the step; in bf16 stage 2 looks for it only when told to.
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch_size
        deepspeed_config["gradient_clipping"] = max_grad_norm  # the engine clips, accelerator cannot
        deepspeed_config.setdefault("bf16", {})["check_grad_overflow"] = True
    return accelerator


def check_model(config: StepConfig) -> None:
    """Raise UserError for what the model cannot do: rows longer than it has positions for, more layers checkpointed
    than it has, a precision in which its activations overflow, packing."""
    positions, model_config = num_positions(config.model), load_config(config.model)
    if config.max_seq_len > positions:
        raise UserError(
            f"--max_seq_len {config.max_seq_len}: the language model of {config.model} has {positions} positions "
            f"(max_position_embeddings); choose --max_seq_len {positions} or less"
        )
    if config.checkpoint_num_layers is not None or config.checkpoint_num_mlps:
        num_layers = num_decoder_layers(config.model)
        num_whole = num_layers if config.checkpoint_num_layers is None else config.checkpoint_num_layers
        if num_whole + config.checkpoint_num_mlps > num_layers:
            raise UserError(
                f"--checkpoint_num_layers {num_whole} and --checkpoint_num_mlps {config.checkpoint_num_mlps}: "
                f"{config.model} has {num_layers} decoder layers, choose no more together"
            )
    family = family_of(model_config)
    if config.mixed_precision in family.refused_precisions:
        choices = " or ".join(name for name in MIXED_PRECISIONS if name not in family.refused_precisions)
        raise UserError(
            f"--mixed_precision {config.mixed_precision}: activations of {model_config.model_type} overflow in it, "
            f"choose {choices}"
        )
    if config.packing and not packs(model_config):
        raise UserError(
            f"--packing true: nobody has shown that {model_config.model_type} keeps the samples of a row apart, leave "
            "it out"
        )


def needs_padding_mask(config: StepConfig) -> bool:
    """Whether batches bring `attention_mask`. A causal kernel without one takes half the time. In fp32, and on the
    older GPUs that train in fp16, PyTorch's kernels without a mask do not share keys among heads, and take more
    memory."""
    return reads_padding_mask(load_config(config.model)) or config.mixed_precision != "bf16"


def build_model(
    config: StepConfig, is_deepspeed: bool, is_fsdp: bool = False, report: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """LoRA on the language model, the trainable modules in full, the rest frozen in the compute dtype.

    What is trained is held in fp32; DeepSpeed keeps fp32 masters of its own and wants one dtype in the module.
    `report` is told what is trained in full, and what is not although it was asked for.
    """
    if is_deepspeed and config.use_dora and config.quantize != "none":
        raise UserError("--use_dora true: not with 4-bit weights under DeepSpeed, choose single.yaml or ddp.yaml")
    if is_fsdp and config.mixed_precision == "fp16":
        raise UserError(
            "--mixed_precision fp16: accelerate's loss scaler fails under FSDP2, choose bf16, ddp.yaml or zero3.yaml"
        )
    if is_fsdp and config.quantize != "none":
        raise UserError(
            f"--quantize {config.quantize}: FSDP2 would not split 4-bit weights, choose ddp.yaml or zero3.yaml"
        )
    dtype = MIXED_PRECISIONS[config.mixed_precision]
    base = model = load_model(config.model, dtype, config.attn_implementation, config.quantize)
    use_model_loss(base, config.loss == "chunked")
    if config.gradient_checkpointing:
        checkpoint_layers(base, config.checkpoint_num_layers, config.checkpoint_num_mlps)
    names = config.trainable_modules
    if names is None:
        names = default_modules(base, has_adapter=config.lora_r > 0)
    modules = select_modules(base, names)
    pattern = lora_pattern(base, config.lora_target_modules, config.lora_vision_tower) if config.lora_r else None
    base.requires_grad_(False)
    if pattern is not None:
        check_beside_lora(base, modules, pattern, names)
        report_layers_without_lora(base, pattern, report)
        set_seed(config.seed)  # the same adapter, whatever was drawn while loading
        model = get_peft_model(base, lora_config(config, base, pattern, list(modules)))
        without_input_gradients(base)
    else:
        for module in modules.values():
            module.requires_grad_(True)
    unused = freeze_unused(model)
    if trained := [path for path in modules if path not in unused]:
        report(f"Trained in full: {name_some(trained)}")
    if unused:
        report(f"Not trained, because the loss does not depend on it: {name_some(unused)}")
    if not trained_parameters(model):
        raise UserError(f"--trainable_modules {' '.join(names)}: nothing is left to train")
    keep_frozen_towers_in_eval(base)
    lighten(config, model, base, dtype, is_deepspeed, is_fsdp)
    for parameter in trained_parameters(model):
        # PEFT makes an adapter in fp32. ZeRO-3 without offload wants one dtype, and casts only what it has not split.
        parameter.data = parameter.data.to(dtype if is_deepspeed else torch.float32)
    return model


def lighten(
    config: StepConfig,
    model: nn.Module,
    base: PreTrainedModel,
    dtype: torch.dtype,
    is_deepspeed: bool,
    is_fsdp: bool,
) -> None:
    """Let the model's layers compute the same in fewer kernels, and keep less."""
    fuse_norms(base)
    fuse_rotary(language_model(base))
    fuse_gated_mlps(model, reads_weights=not is_deepspeed)
    num_tokens = config.per_device_train_batch_size * config.max_seq_len
    tile_frozen_mlps(language_model(base), config.mlp_tiles, num_tokens, dtype)
    if is_deepspeed:  # it gathers weights for a module's own forward alone
        gather_layers_whole(base)
    else:
        fuse_lora(model)
        # FSDP2's hooks know torch's checkpointing, which is a part of the one backward pass.
        if not (is_fsdp or has_router_loss(base.config)):
            checkpoint_with_less_work(model)
    checkpoint_mlps(model)


def lora_config(config: StepConfig, model: PreTrainedModel, pattern: str, modules: list[str]) -> LoraConfig:
    """LoRA on the layers whose path `pattern` matches, and `modules`, by whole paths, in full."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.lora_bias,
        target_modules=pattern,
        exclude_modules=rf"(?!(?:{pattern})$).*" if takes_names_alone(model) else None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=modules,
        fan_in_fan_out=is_transposed(model),
        task_type="CAUSAL_LM",
    )


def build_optimizer(
    model: nn.Module, optim: str, learning_rate: float, weight_decay: float = 0.0, fused: bool = False
) -> torch.optim.Optimizer:
    """`fused`: all parameters are updated in one kernel, without temporaries."""
    parameters = trained_parameters(model)
    return OPTIMIZERS[optim](parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def fuses_optimizer(accelerator: Accelerator, optim: str = "adamw_torch") -> bool:
    """On a GPU. Not with a loss scaler: accelerate would not see the steps that it skips. DeepSpeed moves the
    parameters itself. torch has no fused SGD for parameters that FSDP2 has split."""
    is_plain = accelerator.scaler is None and accelerator.state.deepspeed_plugin is None
    return is_plain and accelerator.device.type == "cuda" and not (accelerator.is_fsdp2 and optim == "sgd")


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any, **options: Any
) -> list[Any]:
    """accelerator.prepare, under every strategy."""
    if accelerator.is_fsdp2:
        return prepare_sharded(accelerator, model, optimizer, *others)
    return list(accelerator.prepare(model, optimizer, *others, **options))


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: dict[str, torch.Tensor],
    *,
    num_items_in_batch: int,
    max_grad_norm: float,
    skip_nonfinite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """Forward and backward of one micro-batch, and at the end of an update the optimizer's step.

    Args:
        num_items_in_batch: the update's label tokens, over all micro-batches and processes.
        skip_nonfinite: leave parameters and optimizer alone if the gradients' norm is NaN or infinite. The norm is a
            float then, and the host waits for the GPU once an update. DeepSpeed and a loss scaler skip by themselves.

    Returns:
        The micro-batch's share of the update's loss: the sum over its label tokens / `num_items_in_batch`.
        At the end of an update the gradients' norm before clipping, else None.
    """
    loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
    # accelerate and DeepSpeed average over micro-batches and processes; these shares must be summed instead.
    accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
    grad_norm = None
    if accelerator.sync_gradients:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_norm = accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        grad_norm = whole(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm
        grad_norm = float(grad_norm) if skip_nonfinite else grad_norm
    is_skipped = skip_nonfinite and grad_norm is not None and not math.isfinite(grad_norm)
    if not is_skipped or accelerator.scaler is not None:  # a scaler lowers its scale in a step that it skips
        optimizer.step()
    if accelerator.sync_gradients and not is_skipped and not accelerator.optimizer_step_was_skipped:
        scheduler.step()
    optimizer.zero_grad()
    return loss.detach(), grad_norm
