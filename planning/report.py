"""What people read of a plan: a table, the chosen step, and what stands in the way of a faster one."""

from typing import Any

from memory.report import as_flags, duration
from planning.budget import Budget, margin_of
from planning.config import ALLOWED, SEARCHED, PlanConfig
from planning.epoch import Epoch
from planning.front import Front
from planning.predictions import Prediction
from planning.search import Found
from utils import markdown_table, size


MAX_ROWS = 12  # of the table


def plan_lines(config: PlanConfig, budget: Budget, found: Found, front: Front) -> list[str]:
    """The table of the front and, below it, the verdict."""
    samples = config.samples_per_update * config.world_size
    lines = [
        f"{config.model} on {budget_name(config)} ({size(budget.device_bytes)}): an update has {samples} sample"
        f"{'s' * (samples != 1)} of up to {config.max_seq_len} tokens",
        "",
        front_table(front, budget, found.chosen),
        "",
    ]
    return lines + (chosen_lines(config, budget, found, front) if found.chosen else [nothing_fits(config, front)])


def budget_name(config: PlanConfig) -> str:
    return config.card.title if config.budget_gib is None else f"a budget on {config.card.title}"


def front_table(front: Front, budget: Budget, chosen: Prediction | None) -> str:
    """The front's steps, from the least memory to the most tokens a second."""
    header = ["rows", "accumulated", "checkpointed", "strategy", "device", "host", "update", "tokens/s", "fits"]
    return markdown_table(header, [cells(step, budget, step == chosen) for step in front.shown(chosen, MAX_ROWS)])


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
    words = " and ".join(f"{number} {name}{'s' * (number > 1)}" for number, name in parts if number)
    return words + tiles if words else "nothing of the decoder"


def chosen_lines(config: PlanConfig, budget: Budget, found: Found, front: Front) -> list[str]:
    chosen = found.chosen
    names = [*SEARCHED, *ALLOWED.values()]
    flags = {name: getattr(chosen.config, name) for name in names}
    lines = [f"Chosen: {as_flags(flags_changed(config, flags))}".rstrip(": ")]
    if found.changes:
        before = {name: getattr(config, name) for name in found.changes}
        lines.append(
            f"As --allow permits, this changes what is learnt: {as_flags(found.changes)}; {as_flags(before)} before"
        )
    lines.append(kept_free(config, budget, chosen))
    blocked = front.next_faster(chosen, budget)
    if blocked is None:
        lines.append("No faster step was found, whatever its memory.")
    else:
        lines.append(
            f"The next faster one ({blocked.config.per_device_train_batch_size} rows, checkpointed: "
            f"{checkpointing(vars(blocked.config))}) does not fit: {budget.excess(blocked)}."
        )
    return lines


def flags_changed(config: PlanConfig, flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value != getattr(config, name)}


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


def nothing_fits(config: PlanConfig, front: Front) -> str:
    """And what might help."""
    least = front.least
    what = f"the smallest step takes {size(least.device_bytes)} of the device and {size(least.host_bytes)} of RAM"
    more = [word for word in ALLOWED if word not in (config.allow or ()) and ALLOWED[word] not in config.locked]
    help_ = f" --allow {' '.join(more)} lets the plan change more." if more and config.lora_r else ""
    return f"NOTHING FITS {budget_name(config)}: {what}.{help_}"


def epoch_lines(epoch: Epoch) -> list[str]:
    most = f"at most {time_words(epoch.most_seconds)}, if every row were full"
    mean = f"their mean of {epoch.mean_tokens} tokens"
    likely = "" if epoch.seconds is None else f"about {time_words(epoch.seconds)} at {mean}, "
    lines = [f"An epoch of {epoch.num_samples:,} samples is {epoch.num_updates:,} updates: {likely}{most}."]
    if epoch.counts_bytes:
        lines.append(
            "A preset has no tokenizer: each byte of text was counted as a token, so the real mean is smaller."
        )
    if (packed := epoch.packed) is not None:
        flags = f"--packing true --gradient_accumulation_steps {packed.gradient_accumulation_steps}"
        fits = "fits" if packed.fits else "does not fit"
        lines.append(
            f"Packed, they fill {packed.num_rows:,} rows, and an epoch takes {time_words(packed.seconds)}: with "
            f"{flags} an update has about as many samples. It needs {size(packed.device_bytes)}, which {fits}."
        )
    return lines


def time_words(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
