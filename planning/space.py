"""What a plan may change of a step: what leaves all that is learnt as it is, and what --allow names."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from memory.config import ProbeConfig
from memory.probed_step import num_image_positions
from models.loading import num_decoder_layers
from planning.config import ALLOWED, PlanConfig
from utils import UserError


Flags = dict[str, Any]
TILES = (8, 16)  # of an MLP, where the step is too large with as many as it takes by itself
MIN_RANK, MIN_TEXT_TOKENS, MIN_IMAGE_PIXELS = 4, 64, 224 * 224
FEWER_TARGETS = ["q_proj", "v_proj"]  # of the LoRA paper


def checkpointed(num_layers: int | None, num_mlps: int) -> Flags:
    return {"gradient_checkpointing": True, "checkpoint_num_layers": num_layers, "checkpoint_num_mlps": num_mlps}


ALL_LAYERS = checkpointed(None, 0)  # also for models that checkpoint all layers or none
NO_CHECKPOINTING: Flags = ALL_LAYERS | {"gradient_checkpointing": False}


def row_choices(config: PlanConfig) -> list[Flags]:
    """Rows of a micro-batch against micro-batches, few rows first: the samples of an update stay the same."""
    total = config.samples_per_update
    rows = [rows for rows in range(1, total + 1) if total % rows == 0]
    choices = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": total // n} for n in rows]
    return [each for each in choices if all(config.locked.get(name, value) == value for name, value in each.items())]


def knots(config: PlanConfig) -> list[Flags]:
    """Three ways to checkpoint, from the least memory to the least time: all layers, all MLPs, nothing. One alone
    where the flags must stay."""
    names = ("gradient_checkpointing", "checkpoint_num_layers", "checkpoint_num_mlps")
    if any(config.stays(name) for name in names):
        return [{name: getattr(config, name) for name in names}]
    return [ALL_LAYERS, checkpointed(0, num_decoder_layers(config.model)), NO_CHECKPOINTING]


def between(config: ProbeConfig, through_mlps: bool) -> list[Flags]:
    """All ways to checkpoint from all layers to nothing, a layer at a time. `through_mlps`: first each layer goes on
    to recompute its MLP alone, and then nothing."""
    number = num_decoder_layers(config.model)
    layers = [checkpointed(n, number - n if through_mlps else 0) for n in range(number - 1, 0, -1)]
    mlps = [checkpointed(0, n) for n in range(number, 0, -1)] if through_mlps else []
    return [ALL_LAYERS, *layers, *mlps, NO_CHECKPOINTING]


def tighter(config: PlanConfig) -> Iterator[Flags]:
    """What saves a little more memory where checkpointing all layers does not suffice."""
    yield {}
    if not config.stays("mlp_tiles"):
        yield from ({"mlp_tiles": number} for number in TILES)


def strategies(config: PlanConfig) -> list[Flags]:
    """The typed strategy and, where it may change, ZeRO-3 with all that is frozen in host memory."""
    if config.stays("strategy") or config.card.shares_host_memory:
        return [{}]
    return [{}, {"strategy": "zero3", "offload": "param", "config_file": None}]


def allowed_changes(config: PlanConfig) -> Iterator[Flags]:
    """What --allow permits: nothing, then ever more, each time one thing and the least harmful first."""
    changes: Flags = {}
    yield {}
    for word in (word for word in ALLOWED if word in (config.allow or ())):
        for value in values_of(config, word):
            changes = changes | {ALLOWED[word]: value}
            yield changes


def values_of(config: ProbeConfig, word: str) -> Iterator[Any]:
    """Ever smaller values of what `word` of --allow names."""
    if word == "quantize" and config.quantize == "none":
        yield "nf4"
    elif word == "targets" and not set(config.lora_target_modules) <= set(FEWER_TARGETS):
        yield FEWER_TARGETS
    elif word == "rank":
        yield from halves(config.lora_r, MIN_RANK)
    elif word == "pixels":
        yield from smaller_images(config)
    elif word == "length":
        yield from halves(config.max_seq_len, num_image_positions(config) + MIN_TEXT_TOKENS)


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
