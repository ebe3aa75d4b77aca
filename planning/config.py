"""PlanConfig: the flags of memory_probe.py, those of a probe and those of `--plan`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from memory.cards import GPUS
from memory.config import ProbeConfig
from memory.gpus import Gpu
from memory.strategy import CONFIG_FOLDER, Strategy
from memory.sweep import parse_grid
from utils import GIB, UserError, check_minimum, flag


# What --allow may name, and the flag that it changes; in this order, the least harm first.
ALLOWED = {
    "quantize": "quantize",
    "targets": "lora_target_modules",
    "rank": "lora_r",
    "pixels": "max_image_pixels",
    "length": "max_seq_len",
}
OF_ADAPTER = ("quantize", "targets", "rank")  # words of --allow that only LoRA knows
CHANGES = (*ALLOWED.values(), "lora_alpha")  # the flags that --allow changes: lora_alpha goes with the rank
# What a plan changes by itself: none of it changes what is learnt.
SEARCHED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpoint_num_layers",
    "checkpoint_num_mlps",
    "mlp_tiles",
    "strategy",
    "offload",
)
# Together they say how many samples an update has: that stays, the two may change.
SAMPLES = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(kw_only=True)
class PlanConfig(ProbeConfig):
    plan: bool = flag(False, "find the fastest step that fits --gpu, without changing what is learnt")
    lock: list[str] | None = flag(None, "FLAG=VALUE ...: with --plan, what must stay as it is")
    allow: list[str] | None = flag(
        None, f"{' '.join(ALLOWED)}: with --plan, what may change if nothing fits without host memory"
    )
    reserve_gib: float = flag(0.0, "with --plan, GiB to leave free on the device: 0.5 to 1 where a screen is on it")
    host_gib: float | None = flag(None, "with --plan, GiB of host RAM that a run may use; default: without limit")
    dataset: str | None = flag(None, "with --plan, your data, as train.py takes it: an epoch's time is told")
    image_folder: str | None = flag(None, "with --plan, the folder that image names of --dataset start from")

    def __post_init__(self) -> None:
        if self.plan:
            self._check_beside_plan()
            self.mode = "predict"
            self._take_locked()
        else:
            self._check_without_plan()
        super().__post_init__()
        if self.plan:
            self._check_plan()

    def _check_beside_plan(self) -> None:
        if self.mode not in (None, "predict"):
            raise UserError(f"--mode {self.mode}: a plan predicts, leave it out")
        if self.device not in (None, "cuda"):
            raise UserError(f"--device {self.device}: a plan is for a GPU, leave it out")
        for name in ("sweep", "explain", "calibrate"):
            if getattr(self, name):
                raise UserError(f"--{name}: not with --plan, leave one of them out")

    def _check_without_plan(self) -> None:
        for name in ("lock", "allow", "reserve_gib", "host_gib", "dataset", "image_folder"):
            if getattr(self, name) != DEFAULTS[name]:
                raise UserError(f"--{name}: it belongs to --plan, give that too or leave it out")

    def _check_plan(self) -> None:
        check_minimum(self, reserve_gib=0)
        if self.host_gib is not None and not 0 < self.host_gib < math.inf:
            raise UserError(f"--host_gib {self.host_gib}: it must be above 0, and finite")
        if self.image_folder is not None and self.dataset is None:
            raise UserError("--image_folder: it is that of --dataset, give that too")
        for word in self.allow or ():
            self._check_allowed(word)
        self.launch_file(self.launch)

    def _take_locked(self) -> None:
        """What is locked is then checked like what is typed."""
        for name, value in self.locked.items():
            typed = getattr(self, name)
            if typed not in (value, DEFAULTS[name]):
                raise UserError(f"--lock {name}={value}: --{name} {typed} is typed too, leave one of them out")
            setattr(self, name, value)

    def _check_allowed(self, word: str) -> None:
        if word not in ALLOWED:
            raise UserError(f"--allow {word}: choose of {', '.join(ALLOWED)}")
        if ALLOWED[word] in self.locked:
            raise UserError(f"--allow {word}: --lock keeps {ALLOWED[word]}, leave one of them out")
        if word in OF_ADAPTER and self.lora_r == 0:
            raise UserError(f"--allow {word}: --lora_r 0 trains no adapter, leave one of them out")

    @cached_property
    def locked(self) -> dict[str, Any]:
        """The flags of --lock and their values. Raises UserError."""
        names = [word.partition("=")[0].replace("-", "_") for word in self.lock or ()]
        for word, name in zip(self.lock or (), names, strict=True):
            if name in ("gpu", "budget_gib", "mode", "device", "output"):
                raise UserError(f"--lock {word}: a plan does not change it, give it as a flag of its own")
            if names.count(name) > 1:
                raise UserError(f"--lock {word}: {name} is locked twice, leave one of them out")
        try:
            grid = parse_grid(self.lock or [])
        except UserError as error:
            raise UserError(str(error).replace("--sweep", "--lock").replace("VALUE,VALUE", "VALUE")) from None
        for name, values in grid.items():
            if len(values) > 1:
                raise UserError(f"--lock {name}={','.join(map(str, values))}: give it one value")
        return {name: values[0] for name, values in grid.items()}

    def stays(self, name: str) -> bool:
        """Whether a plan must keep the flag: it is locked, or was typed with another value than its default."""
        if name in self.locked:
            return True
        # One process is single by default, several are typed as ddp.
        default = "ddp" if name == "strategy" and self.world_size > 1 else DEFAULTS[name]
        return name not in SAMPLES and getattr(self, name) != default

    @property
    def keeps_strategy(self) -> bool:
        return any(self.stays(name) for name in ("strategy", "offload", "config_file"))

    @property
    def card(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def samples_per_update(self) -> int:
        """Of each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def reserve_bytes(self) -> int:
        return int(self.reserve_gib * GIB)

    @property
    def probe_config(self) -> ProbeConfig:
        """The step as it is typed."""
        return ProbeConfig(**{each.name: getattr(self, each.name) for each in fields(ProbeConfig)})

    def launch_file(self, strategy: Strategy) -> str:
        """accelerate's config for a strategy: the user's own, or the one of accelerate_configs. Raises UserError."""
        if self.config_file is not None and strategy == self.launch:
            return self.config_file
        known = dict(launch_files())
        if (strategy.name, strategy.offload) not in known:
            choices = ", ".join(f"{name} with --offload {offload}" for name, offload in known)
            raise UserError(
                f"--strategy {strategy.name} --offload {strategy.offload}: accelerate_configs has no file for it. "
                f"Choose one of {choices}, or name your own file with --config_file"
            )
        return known[strategy.name, strategy.offload]


DEFAULTS = {
    each.name: each.default_factory() if callable(each.default_factory) else each.default
    for each in fields(PlanConfig)
}


def launch_files() -> Iterator[tuple[tuple[str, str], str]]:
    """Strategy and offload of each file in accelerate_configs, and the file as a command names it."""
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        strategy = Strategy.from_config_file(path)
        yield (strategy.name, strategy.offload), str(Path(CONFIG_FOLDER.name) / path.name)
