"""What people read of a plan: a table, the chosen step, and what stands in the way of a faster one."""

from collections.abc import Iterable
from typing import Any

from memory.config import ProbeConfig
from memory.report import as_flags, duration
from planning.budget import Budget, margin_of
from planning.config import ALLOWED, CHANGES, OF_ADAPTER, SEARCHED, PlanConfig
from planning.epoch import Epoch
from planning.front import Front
from planning.predictions import Prediction
from planning.search import Found
from utils import counted, markdown_table, size


MAX_ROWS = 12  # of the table


def plan_lines(config: PlanConfig, budget: Budget, found: Found, front: Front) -> list[str]:
    """The table of the front and, below it, the verdict."""
    samples = counted(config.samples_per_update * config.world_size, "sample")
    images = f"{counted(config.images_per_sample, 'image')} of {config.image_size}"
    lines = [
        f"{config.model} on {budget_name(config)} ({size(budget.device_bytes)}): an update has {samples} of up to "
        f"{config.max_seq_len} tokens, with {images if config.images_per_sample else 'no images'} each",
        "",
        front_table(config, front, budget, found.chosen),
        "",
    ]
    if found.chosen is None:
        return [*lines, nothing_fits(config, budget, front)]
    return lines + chosen_lines(config, budget, found, front)


def budget_name(config: PlanConfig) -> str:
    return config.card.title if config.budget_gib is None else f"a budget on {config.card.title}"


def front_table(config: PlanConfig, front: Front, budget: Budget, chosen: Prediction | None) -> str:
    """The front's steps, from the least memory to the most tokens a second."""
    header = ["rows", "accumulated", "checkpointed", "strategy", "device", "host", "update", "tokens/s", "fits"]
    steps = front.shown(chosen, MAX_ROWS)
    rows = [cells(step, budget, step == chosen) for step in steps]
    changes = [as_flags(flags_changed(config, step.config, CHANGES)) for step in steps]
    if any(changes):  # of what is learnt
        header = ["changed", *header]
        rows = [[change, *row] for change, row in zip(changes, rows, strict=True)]
    return markdown_table(header, rows)


def cells(step: Prediction, budget: Budget, is_chosen: bool) -> list[Any]:
    config = step.config
    verdict = "**chosen**" if is_chosen else "yes" if budget.fits(step) else budget.excess(step)
    return [
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        checkpointing(vars(config)),
        config.strategy,
        size(step.device_bytes),
        size(step.host_bytes),
        duration(vars(step)),
        f"{step.tokens_per_second:,.0f}",
        verdict,
    ]


def checkpointing(flags: dict[str, Any]) -> str:
    """Which layers recompute what, by a step's flags."""
    if not flags["gradient_checkpointing"]:
        return "nothing"
    number_of_tiles = flags.get("mlp_tiles", 0)
    tiles = f", MLPs in {number_of_tiles} tiles" if number_of_tiles > 1 else ""
    if flags.get("checkpoint_num_layers") is None:
        return f"all layers{tiles}"
    parts = [(flags["checkpoint_num_layers"], "layer"), (flags["checkpoint_num_mlps"], "MLP")]
    words = " and ".join(counted(number, noun) for number, noun in parts if number)
    return words + tiles if words else "nothing of the decoder"


def chosen_lines(config: PlanConfig, budget: Budget, found: Found, front: Front) -> list[str]:
    chosen = found.chosen
    flags = as_flags(flags_changed(config, chosen.config, (*SEARCHED, *CHANGES)))
    lines = [f"Chosen: {flags or 'the step as you typed it'}"]
    if found.changes:
        before = {name: getattr(config, name) for name in found.changes}
        lines.append(
            f"As --allow permits, this changes what is learnt: {as_flags(found.changes)}; {as_flags(before)} before"
        )
    lines.append(kept_free(config, budget, chosen))
    blocked = front.next_faster(chosen, budget)
    if blocked is None:
        lines.append("Of the steps that were tried, none is faster.")
    else:
        lines.append(
            f"The next faster one ({counted(blocked.config.per_device_train_batch_size, 'row')}, checkpointed: "
            f"{checkpointing(vars(blocked.config))}) does not fit: {budget.excess(blocked)}."
        )
    return lines


def flags_changed(config: PlanConfig, step: ProbeConfig, names: Iterable[str]) -> dict[str, Any]:
    """Those of the step that are not as they were typed."""
    return {name: getattr(step, name) for name in names if getattr(step, name) != getattr(config, name)}


def kept_free(config: PlanConfig, budget: Budget, chosen: Prediction) -> str:
    """The margin, part by part."""
    share = margin_of(chosen)
    parts = [f"{size(chosen.device_bytes * share)} ({share:.0%}) for what the allocator may hold besides"]
    if budget.card_margin_bytes:
        parts.append(f"{size(budget.card_margin_bytes)} because this card has not been measured")
    if budget.reserve_bytes:
        parts.append(f"{size(budget.reserve_bytes)} as --reserve_gib asks")
    left = budget.device_bytes - budget.needed_bytes(chosen)
    return f"Kept free of the device: {', '.join(parts)}. {size(left)} is left over."


def nothing_fits(config: PlanConfig, budget: Budget, front: Front) -> str:
    """And what might help."""
    least = front.least
    free_bytes = budget.margin_bytes(least) + budget.reserve_bytes
    what = f"the smallest step takes {size(least.device_bytes)} of the device, {size(free_bytes)} must stay free"
    host = f", and it takes {size(least.host_bytes)} of RAM"
    more = [word for word in ALLOWED if word not in (config.allow or ()) and ALLOWED[word] not in config.locked]
    if config.lora_r == 0:
        more = [word for word in more if word not in OF_ADAPTER]
    help_ = f" --allow {' '.join(more)} lets the plan change more." if more else ""
    help_ += " --lora_r 16 trains an adapter in place of all weights." if config.lora_r == 0 else ""
    return f"NOTHING FITS {budget_name(config)}: {what}{host}.{help_}"


def epoch_lines(epoch: Epoch) -> list[str]:
    most = f"at most {time_words(epoch.most_seconds)}, if every row were full"
    mean = f"their mean of {epoch.mean_tokens} tokens"
    likely = "" if epoch.seconds is None else f"about {time_words(epoch.seconds)} at {mean}, "
    samples, updates = counted(epoch.num_samples, "sample"), counted(epoch.num_updates, "update")
    lines = [f"An epoch of {samples} is {updates}: {likely}{most}."]
    if epoch.counts_bytes:
        lines.append(
            "A preset has no tokenizer: each byte of text was counted as a token, so the real mean is smaller."
        )
    if (packed := epoch.packed) is not None:
        flags = f"--packing true --gradient_accumulation_steps {packed.gradient_accumulation_steps}"
        fits = "fits" if packed.fits else "does not fit"
        lines.append(
            f"Packed, they fill {counted(packed.num_rows, 'row')}, and an epoch takes {time_words(packed.seconds)}: "
            f"with {flags} an update has about as many samples. It needs {size(packed.device_bytes)}, which {fits}."
        )
    return lines


def time_words(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
