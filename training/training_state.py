"""What training changes, in and out unchanged: parameters, optimizer, learning rate, loss scale, random numbers.

The form is the same under every strategy: one fp32 tensor for each parameter and each of its moments, whole, by the
parameter's name. So a checkpoint can go on under another strategy or with another number of processes.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from models.gather import gathered, is_partitioned


Tensors = Iterator[tuple[str, torch.Tensor]]
PARAMETER, STEP = "parameter", "step"  # the first part of a tensor's name; the others are the optimizer's words


class TrainingState:
    """Reads and writes the state of a prepared model, its optimizer and its scheduler. All processes call together.

    Where a process is named `flat`, it is DeepSpeed's: the fp32 partition that this process's optimizer works on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.accelerator = accelerator
        self.scheduler = scheduler
        self.optimizer = optimizer.optimizer  # torch's, or DeepSpeed's around torch's
        self.is_zero = hasattr(self.optimizer, "loss_scaler")
        unwrapped = accelerator.unwrap_model(model)
        self.parameters = {name: p for name, p in unwrapped.named_parameters() if p.requires_grad}

    def shapes(self) -> dict[str, list[int]]:
        """The whole parameters' shapes by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}

    def tensors(self) -> Tensors:
        """(`parameter/NAME`, fp32), (`exp_avg/NAME`, fp32) ... (`step/NAME`, a number), on the CPU, one at a time."""
        for name, parameter in self.parameters.items():
            for key, tensor in self._zero_tensors(parameter) if self.is_zero else self._torch_tensors(parameter):
                yield f"{key}/{name}", tensor.detach().to("cpu", copy=True).contiguous()

    def load_tensors(self, tensors: Tensors) -> None:
        """The reverse of `tensors`."""
        by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.parameters}
        for full_name, tensor in tensors:
            key, _, name = full_name.partition("/")
            by_name[name][key] = tensor
        if self.is_zero:
            self._load_zero(by_name)
        else:
            self._load_torch(by_name)

    def make_optimizer_state(self) -> None:
        """What AdamW makes at its first step, where it is not there yet: moments of 0 and no step done."""
        adamw = self.optimizer.optimizer if self.is_zero else self.optimizer
        if not isinstance(adamw, torch.optim.AdamW):
            return
        for parameter in self._flat_partitions() if self.is_zero else self.parameters.values():
            if not adamw.state.get(parameter):
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adamw.state[parameter] = {STEP: torch.tensor(0.0), **moments}

    def values(self) -> dict[str, Any]:
        """The scheduler's and the loss scaler's state, for JSON. The same on every process."""
        return {"scheduler": self.scheduler.state_dict(), "loss_scaler": self._loss_scaler_state()}

    def load_values(self, values: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(values["scheduler"])
        groups = self.scheduler.optimizer.param_groups
        for group, learning_rate in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        if values["loss_scaler"] and self._loss_scaler_state():  # not where the precision is another one now
            if self.is_zero:
                vars(self.optimizer.loss_scaler).update(values["loss_scaler"])
            else:
                self.accelerator.scaler.load_state_dict(values["loss_scaler"])

    def loss_scale(self) -> float | None:
        """The factor of fp16 losses; None in other precisions."""
        if self.is_zero:
            return float(self.optimizer.loss_scale) if self.optimizer.loss_scaler.dynamic else None
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else None

    def _loss_scaler_state(self) -> dict[str, Any]:
        if not self.is_zero:
            return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        if not self.optimizer.loss_scaler.dynamic:
            return {}
        return {k: v for k, v in vars(self.optimizer.loss_scaler).items() if isinstance(v, (bool, int, float))}

    def _torch_tensors(self, parameter: nn.Parameter) -> Tensors:
        yield PARAMETER, parameter
        yield from self.optimizer.state.get(parameter, {}).items()

    def _load_torch(self, by_name: dict[str, dict[str, torch.Tensor]]) -> None:
        state_dict = self.optimizer.state_dict()
        for i, (name, parameter) in enumerate(self.parameters.items()):  # build_optimizer's order
            tensors = dict(by_name[name])
            parameter.data.copy_(tensors.pop(PARAMETER))
            if tensors:
                state_dict["state"][i] = tensors
        self.optimizer.load_state_dict(state_dict)

    def _flat_partitions(self) -> list[torch.Tensor]:
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):  # stage 3
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _zero_tensors(self, parameter: nn.Parameter) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        yield PARAMETER, safe_get_full_fp32_param(parameter)
        flat = self._flat_partitions()[0]
        for key, value in self.optimizer.optimizer.state.get(flat, {}).items():
            if value.shape == flat.shape:
                yield key, safe_get_full_optimizer_state(parameter, key)
            else:
                yield key, value

    def _load_zero(self, by_name: dict[str, dict[str, torch.Tensor]]) -> None:
        some = next(iter(by_name.values()))
        keys = [key for key in some if key not in (PARAMETER, STEP)]
        for flat in self._flat_partitions() if STEP in some else []:  # torch would make them at the first step
            state = {key: torch.zeros_like(flat) for key in keys}
            self.optimizer.optimizer.state[flat] = {STEP: some[STEP].clone(), **state}
        if is_partitioned(self.parameters.values()):
            self._load_zero3(by_name, keys)
        else:
            self._load_zero2(by_name, keys)

    def _load_zero3(self, by_name: dict[str, dict[str, torch.Tensor]], keys: list[str]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in self.parameters.items():
            tensors = by_name[name]
            safe_set_local_fp32_param(parameter, self._own_part(tensors[PARAMETER], parameter))
            for key in keys:
                safe_set_local_optimizer_state(parameter, self._own_part(tensors[key], parameter), key)
            with gathered([parameter], modifier_rank=0):  # what the module computes with, in its own precision
                parameter.data.copy_(tensors[PARAMETER])

    def _own_part(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This process's share of a whole tensor, with zeros behind its end as DeepSpeed pads it."""
        size = parameter.ds_tensor.numel()
        own = tensor.flatten()[size * self.accelerator.process_index :][:size]
        return torch.cat([own, own.new_zeros(size - own.numel())])

    def _load_zero2(self, by_name: dict[str, dict[str, torch.Tensor]], keys: list[str]) -> None:
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        if keys:
            for group, flat in zip(self.optimizer.bit16_groups, self._flat_partitions(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.optimizer.state)
        for name, parameter in self.parameters.items():
            tensors = by_name[name]
            parameter.data.copy_(tensors[PARAMETER])
            safe_set_full_fp32_param(parameter, tensors[PARAMETER].to(parameter.device))
            for key in keys:
                safe_set_full_optimizer_state(parameter, tensors[key].to(parameter.device), key)


def rng_state() -> dict[str, Any]:
    """The state of this process's random number generators. Costs no synchronisation on a GPU."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_state_to_json(state: dict[str, Any]) -> dict[str, Any]:
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    json_state = {"python": [version, list(internal), gauss], "numpy": [name, keys.tolist(), *rest]}
    return json_state | {key: bytes(state[key].tolist()).hex() for key in ("torch", "cuda") if key in state}


def rng_state_from_json(state: dict[str, Any]) -> dict[str, Any]:
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    result = {"python": (version, tuple(internal), gauss), "numpy": (name, np.array(keys, dtype=np.uint32), *rest)}
    for key in ("torch", "cuda"):
        if key in state:
            result[key] = torch.tensor(list(bytes.fromhex(state[key])), dtype=torch.uint8)
    return result
