"""What a plan may change of a step: what leaves all that is learnt as it is, and what --allow names."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from memory.config import ProbeConfig
from memory.probed_step import num_image_positions
from models.family import has_router_loss
from models.loading import load_config, num_decoder_layers, supports_gradient_checkpointing
from planning.config import PlanConfig
from utils import UserError


Flags = dict[str, Any]
MAX_ROWS = 1024  # of a micro-batch, unless more are typed: activations of more than that fit no card
TILES = (8, 16)  # of an MLP, where the step is too large with as many as it takes by itself
MIN_RANK, MIN_TEXT_TOKENS, MIN_IMAGE_PIXELS = 4, 64, 224 * 224
FEWER_TARGETS = ["q_proj", "v_proj"]  # of the LoRA paper


def checkpointed(num_layers: int | None, num_mlps: int) -> Flags:
    return {"gradient_checkpointing": True, "checkpoint_num_layers": num_layers, "checkpoint_num_mlps": num_mlps}


ALL_LAYERS = checkpointed(None, 0)  # also for models that checkpoint all layers or none
NO_CHECKPOINTING: Flags = ALL_LAYERS | {"gradient_checkpointing": False}


def row_choices(config: PlanConfig) -> list[Flags]:
    """Rows of a micro-batch against micro-batches, few rows first: the samples of an update stay the same."""
    total, typed = config.samples_per_update, config.per_device_train_batch_size
    rows = [n for n in range(1, min(total, MAX_ROWS) + 1) if total % n == 0]
    if typed > MAX_ROWS:
        rows.append(typed)
    if has_router_loss(load_config(config.model)):  # it is of a micro-batch: other rows would change what is learnt
        rows = [typed]
    choices = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": total // n} for n in rows]
    return [each for each in choices if agrees(config.locked, each)]


def agrees(locked: Flags, flags: Flags) -> bool:
    return all(flags[name] == value for name, value in locked.items() if name in flags)


def paths(config: PlanConfig) -> list[list[Flags]]:
    """Ways to checkpoint less and less, a layer at a time, from the least memory to the least time: by whole layers,
    and so that each layer first goes on to recompute its MLP alone. One path where the flags leave no choice."""
    number = num_decoder_layers(config.model)
    locked = {name: getattr(config, name) for name in NO_CHECKPOINTING if config.stays(name)}
    if not supports_gradient_checkpointing(config.model):
        return [[NO_CHECKPOINTING | locked]]
    layers, mlps = locked.get("checkpoint_num_layers"), locked.get("checkpoint_num_mlps")
    if layers is not None:
        found = [[checkpointed(layers, n) for n in range(number - layers, -1, -1)]]
    elif mlps is not None:
        found = [[checkpointed(n, mlps) for n in range(number - mlps, -1, -1)]]
    else:
        # Without a decoder's layer, towers that are trained are still checkpointed.
        by_layers = [ALL_LAYERS, *(checkpointed(n, 0) for n in range(number - 1, -1, -1))]
        to_mlps = [ALL_LAYERS, *(checkpointed(n, number - n) for n in range(number - 1, -1, -1))]
        found = [by_layers, [*to_mlps, *(checkpointed(0, n) for n in range(number - 1, -1, -1))]]
    ended = [[*path, NO_CHECKPOINTING] for path in found]
    # Flags that contradict each other are left to the step, which says so.
    kept = [[rung for rung in path if agrees(locked, rung)] or [locked] for path in ended]
    return kept if kept[0] != kept[-1] else kept[:1]


def tighter(config: PlanConfig) -> Iterator[Flags]:
    """What saves a little more memory where checkpointing all layers does not suffice."""
    yield {}
    if not config.stays("mlp_tiles"):
        yield from ({"mlp_tiles": number} for number in TILES)


def strategies(config: PlanConfig) -> list[Flags]:
    """The typed strategy and, where it may change, ZeRO-3 with all that is frozen in host memory."""
    if config.keeps_strategy or config.card.shares_host_memory:
        return [{}]
    return [{}, {"strategy": "zero3", "offload": "param"}]


def values_of(config: ProbeConfig, word: str) -> Iterator[Flags]:
    """Ever smaller values of what `word` of --allow names."""
    if word == "quantize" and config.quantize == "none":
        yield {"quantize": "nf4"}
    elif word == "targets" and has_more_targets(config.lora_target_modules):
        yield {"lora_target_modules": FEWER_TARGETS}
    elif word == "rank":
        yield from smaller_ranks(config)
    elif word == "pixels":
        yield from ({"max_image_pixels": pixels} for pixels in smaller_images(config))
    elif word == "length":
        least = num_image_positions(config) + MIN_TEXT_TOKENS
        yield from ({"max_seq_len": length} for length in halves(config.max_seq_len, least))


def has_more_targets(names: list[str]) -> bool:
    return names == ["all-linear"] or set(names) > set(FEWER_TARGETS)


def smaller_ranks(config: ProbeConfig) -> Iterator[Flags]:
    """lora_alpha goes with the rank, so that the adapter's scale stays; but for rsLoRA, whose scale is made to bear
    another rank."""
    for rank in halves(config.lora_r, MIN_RANK):
        alpha = {} if config.use_rslora else {"lora_alpha": max(config.lora_alpha * rank // config.lora_r, 1)}
        yield {"lora_r": rank} | alpha


def halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def smaller_images(config: ProbeConfig) -> Iterator[int]:
    """Ever fewer pixels, as long as images then take fewer positions."""
    width, height = config.photo_size
    pixels, positions = config.max_image_pixels or width * height, num_image_positions(config)
    for smaller in halves(pixels, MIN_IMAGE_PIXELS):
        fewer = num_image_positions(replace(config, max_image_pixels=smaller))
        if fewer < positions:
            positions = fewer
            yield smaller


def changed(config: ProbeConfig, flags: Flags) -> ProbeConfig | str:
    """The configuration with these flags; or why there is none."""
    try:
        return replace(config, **flags)
    except UserError as error:
        return str(error)
