"""How a run is laid out: one process, DDP, ZeRO 1 to 3 or FSDP2, with offload, on any number of processes.

    strategy = Strategy.from_config_file("accelerate_configs/zero3.yaml")     # with the file's own bucket sizes
    strategy = Strategy.from_flags("zero3", offload="param", world_size=2)    # with those of accelerate_configs

memory/predict.py traces a strategy, memory/measure.py measures it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import str_to_bool

from utils import UserError, brief_error, check_choice


STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
OFFLOADS = ("none", "optimizer", "param")
FSDP_SWITCHES = {"fsdp_offload_params", "fsdp_reshard_after_forward", "fsdp_cpu_ram_efficient_loading"}
CONFIG_FOLDER = Path(__file__).parent.parent / "accelerate_configs"


@dataclass(frozen=True)
class Strategy:
    """`offload` "param" keeps weights and optimizer state in host memory, "optimizer" only the state.
    `deepspeed_config` is what DeepSpeed's JSON holds, `fsdp_config` the part of accelerate's file with that name."""

    name: str = "single"
    offload: str = "none"
    world_size: int = 1
    deepspeed_config: dict[str, Any] = field(default_factory=dict, compare=False)
    fsdp_config: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_choice("strategy", self.name, STRATEGIES)
        check_choice("offload", self.offload, OFFLOADS)
        if self.world_size < 1:
            raise UserError(f"--world_size {self.world_size}: it must be at least 1")
        if self.name == "single" and self.world_size > 1:
            raise UserError(
                f"--world_size {self.world_size}: single is one process, choose --strategy ddp, zero1-3 or fsdp2"
            )
        if self.offload == "param" and self.name not in ("zero3", "fsdp2"):
            raise UserError(f"--offload param: {self.name} keeps all weights, choose --strategy zero3 or fsdp2")
        if self.offload == "optimizer" and self.name == "fsdp2":
            raise UserError("--offload optimizer: FSDP2 offloads weights and optimizer states together, choose param")
        if self.offload == "optimizer" and self.name in ("single", "ddp"):
            raise UserError(
                f"--offload optimizer: {self.name} cannot offload, choose --strategy zero1, zero2 or zero3"
            )

    @classmethod
    def from_flags(cls, name: str, offload: str = "none", world_size: int = 1) -> "Strategy":
        """With the bucket sizes and thresholds of accelerate_configs. Raises UserError for what cannot be."""
        strategy = cls(name, offload, world_size)
        if name == "fsdp2":
            settings = yaml.safe_load((CONFIG_FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
            return replace(strategy, fsdp_config=settings | {"fsdp_offload_params": offload == "param"})
        if not name.startswith("zero"):
            return strategy
        file_name = "deepspeed_zero3.json" if name == "zero3" else "deepspeed_zero2.json"
        deepspeed_config = json.loads((CONFIG_FOLDER / file_name).read_text())
        zero = deepspeed_config["zero_optimization"]
        zero["stage"] = int(name[-1])
        for key, is_offloaded in (("offload_param", offload == "param"), ("offload_optimizer", offload != "none")):
            zero.pop(key, None)
            if is_offloaded:
                zero[key] = {"device": "cpu", "pin_memory": True}
        return replace(strategy, deepspeed_config=deepspeed_config)

    @classmethod
    def from_config_file(cls, path: str | Path, world_size: int | None = None) -> "Strategy":
        """From accelerate's config file. `world_size` None: the file's number of processes. Raises UserError."""
        launch = _read_mapping(path, path, yaml.safe_load)
        kind = launch.get("distributed_type")
        world_size = launch.get("num_processes", 1) if world_size is None else world_size
        if not isinstance(world_size, int):
            raise UserError(f"--config_file {path}: num_processes is {world_size}, put a number there")
        if kind in ("NO", False):  # a bare NO is false in YAML
            return cls("single", "none", world_size)
        if kind in ("MULTI_GPU", "MULTI_CPU"):
            return cls("ddp", "none", world_size)
        if kind == "FSDP":
            return _from_fsdp(path, launch, world_size)
        if kind != "DEEPSPEED":
            raise UserError(
                f"--config_file {path}: distributed_type {kind} is not known; accelerate's config files say NO, "
                "MULTI_GPU, FSDP or DEEPSPEED"
            )
        return _from_deepspeed(path, launch, world_size)


def _from_fsdp(path: str | Path, launch: dict[str, Any], world_size: int) -> Strategy:
    settings = _part_of(path, launch, "fsdp_config")
    for key in FSDP_SWITCHES & settings.keys():
        try:
            settings[key] = str_to_bool(str(settings[key]), to_bool=True)
        except ValueError:
            raise UserError(f"--config_file {path}: {key} is {settings[key]}, put true or false there") from None
    offload = "param" if settings.get("fsdp_offload_params") else "none"
    return Strategy("fsdp2", offload, world_size, fsdp_config=settings)


def _from_deepspeed(path: str | Path, launch: dict[str, Any], world_size: int) -> Strategy:
    file_name = _part_of(path, launch, "deepspeed_config").get("deepspeed_config_file")
    if file_name is None:
        raise UserError(f"--config_file {path}: put DeepSpeed's settings in a JSON, named by deepspeed_config_file")
    # Relative to where the launch is typed; that is the top of the repository for our own.
    candidates = [Path(file_name), CONFIG_FOLDER.parent / file_name]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"--config_file {path}: its deepspeed_config_file {file_name} does not exist, correct the path"
        )
    deepspeed_config = _read_mapping(path, found, json.loads)
    zero = _part_of(found, deepspeed_config, "zero_optimization")
    devices = {key: (zero.get(f"offload_{key}") or {}).get("device", "none") for key in ("param", "optimizer")}
    if "nvme" in devices.values():
        raise UserError(f"--config_file {path}: offload to nvme cannot be predicted, choose the device cpu")
    offload = next((key for key, device in devices.items() if device == "cpu"), "none")
    return Strategy(f"zero{zero.get('stage', 0)}", offload, world_size, deepspeed_config)


def _read_mapping(config_file: str | Path, path: str | Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What `config_file` holds, or a file that it names. Raises UserError: it cannot be read, or has no keys."""
    try:
        content = parse(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {config_file}: {path} cannot be read ({brief_error(error)})") from None
    return _mapping(f"--config_file {config_file}: {path}", content)


def _part_of(path: str | Path, settings: dict[str, Any], key: str) -> dict[str, Any]:
    return _mapping(f"--config_file {path}: {key}", settings.get(key) or {})


def _mapping(name: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{name} has no keys with values, take a file of accelerate_configs as an example")
    return content
