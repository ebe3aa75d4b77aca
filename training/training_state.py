"""What training changes, saved and restored exactly: parameters, optimizer, learning rate, loss scale.

The form is the same under every strategy: one fp32 tensor for each parameter and for each of its moments, unsharded,
named after the parameter. So a checkpoint can be resumed under another strategy or with another number of processes.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from models.fsdp2 import own_part, split_like, whole
from models.gather import gathered


Tensors = Iterator[tuple[str, torch.Tensor]]
PARAMETER, STEP = "parameter", "step"  # the first part of a tensor's name; the others are the optimizer's own keys

# DeepSpeed's undocumented attributes that are used here; `deepspeed_attribute` reads them.
MASTERS = {  # of the optimizer, by stage: a flat fp32 tensor for each parameter group (stage 3: sub-group)
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}
PARAMETER_GROUPS = "bit16_groups"  # of the optimizer, stages 1 and 2: the parameters behind each flat tensor
LOSS_SCALER = "loss_scaler"  # of the optimizer
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes of a dynamic one
WHOLE_SHAPE, PARTITION = "ds_shape", "ds_tensor"  # of a parameter, stage 3


def deepspeed_attribute(owner: object, name: str) -> Any:
    """An attribute that DeepSpeed does not document. Raises RuntimeError if this version does not have it."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"DeepSpeed {version('deepspeed')}: {type(owner).__name__} has no attribute {name!r}, which "
            "training/training_state.py needs; install the version that requirements.txt names"
        ) from None


class TrainingState:
    """Reads and writes the state of a prepared model, its optimizer and its scheduler. All processes call together.

    A tensor called `flat` is DeepSpeed's fp32 partition: the flat buffer that this process's optimizer updates.
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
        plugin = accelerator.state.deepspeed_plugin
        self.zero_stage = plugin.zero_stage if plugin else 0
        wrapped = optimizer.optimizer
        self.zero_optimizer = wrapped if self.zero_stage else None  # DeepSpeed's, around torch's
        self.optimizer: torch.optim.Optimizer = wrapped.optimizer if self.zero_stage else wrapped
        unwrapped = accelerator.unwrap_model(model)
        self.parameters = {name: p for name, p in unwrapped.named_parameters() if p.requires_grad}

    def shapes(self) -> dict[str, list[int]]:
        """The unsharded parameters' shapes by name."""
        if self.zero_stage == 3:
            return {name: list(deepspeed_attribute(p, WHOLE_SHAPE)) for name, p in self.parameters.items()}
        return {name: list(p.shape) for name, p in self.parameters.items()}

    def tensors(self) -> Tensors:
        """(`parameter/NAME`, fp32), (`exp_avg/NAME`, fp32) ... (`step/NAME`, a number), on the CPU, one at a time."""
        for name, parameter in self.parameters.items():
            for key, tensor in self._zero_tensors(parameter) if self.zero_stage else self._torch_tensors(parameter):
                yield f"{key}/{name}", whole(tensor.detach()).to("cpu", copy=True).contiguous()

    def load_tensors(self, tensors: Tensors) -> None:
        """The reverse of `tensors`."""
        by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.parameters}
        for full_name, tensor in tensors:
            key, _, name = full_name.partition("/")
            by_name[name][key] = tensor
        if self.zero_stage:
            self._load_zero(by_name)
        else:
            self._load_torch(by_name)

    def make_optimizer_state(self) -> None:
        """Create what AdamW would create in its first step: moments of 0, and no step counted. Keeps what exists."""
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return
        for tensor in self._updated_tensors():
            if not self.optimizer.state.get(tensor):
                moments = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
                step = torch.tensor(0.0, device=tensor.device if self.optimizer.defaults["fused"] else "cpu")
                self.optimizer.state[tensor] = {STEP: step, **moments}

    def stop_learning(self) -> None:
        """Until `load_values` a step with gradients of 0 changes no parameter, whatever the weight decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def forget_steps(self) -> None:
        """The optimizer counts from 0 again."""
        for state in self.optimizer.state.values():
            if STEP in state:
                state[STEP].zero_()

    def checksums(self) -> list[str]:
        """The sum of every tensor that training changes, of this process's part of it, to tell whether it changed.

        As text, in which nan equals nan.
        """
        held = self.parameters.values()
        if self.zero_stage == 3:
            held = [deepspeed_attribute(parameter, PARTITION) for parameter in held]
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*held, *self._updated_tensors(), *(value for value in state if isinstance(value, torch.Tensor))]
        return [str(_sum(own_part(tensor.detach()))) for tensor in tensors]

    def values(self) -> dict[str, Any]:
        """The scheduler's and the loss scaler's state, for JSON. The same on every process."""
        return {"scheduler": self.scheduler.state_dict(), "loss_scaler": self._loss_scaler_state()}

    def load_values(self, values: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(values["scheduler"])
        groups = self.scheduler.optimizer.param_groups
        for group, learning_rate in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        is_fp16 = values["loss_scaler"] and self._loss_scaler_state()  # before and now: the precision may have changed
        if is_fp16 and self.zero_stage:
            for name in LOSS_SCALER_STATE:
                setattr(self._zero_loss_scaler(), name, values["loss_scaler"][name])
        elif is_fp16:
            self.accelerator.scaler.load_state_dict(values["loss_scaler"])

    def loss_scale(self) -> float | None:
        """The factor of fp16 losses; None in other precisions."""
        if self.zero_stage:
            scaler = self._zero_loss_scaler()
            return None if scaler is None else float(deepspeed_attribute(scaler, "cur_scale"))
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else None

    def _zero_loss_scaler(self) -> object | None:
        """DeepSpeed's, if it is a dynamic one: other precisions have a constant scale of 1."""
        scaler = deepspeed_attribute(self.zero_optimizer, LOSS_SCALER)
        return scaler if deepspeed_attribute(scaler, "dynamic") else None

    def _loss_scaler_state(self) -> dict[str, Any]:
        if not self.zero_stage:
            return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        scaler = self._zero_loss_scaler()
        return {} if scaler is None else {name: deepspeed_attribute(scaler, name) for name in LOSS_SCALER_STATE}

    def _updated_tensors(self) -> list[torch.Tensor]:
        """The tensors that torch's optimizer updates in this process."""
        if not self.zero_stage:
            return list(self.parameters.values())
        return list(deepspeed_attribute(self.zero_optimizer, MASTERS[self.zero_stage]))

    def _torch_tensors(self, parameter: nn.Parameter) -> Tensors:
        yield PARAMETER, parameter
        yield from self.optimizer.state.get(parameter, {}).items()

    def _load_torch(self, by_name: dict[str, dict[str, torch.Tensor]]) -> None:
        state_dict = self.optimizer.state_dict()
        for i, (name, parameter) in enumerate(self.parameters.items()):  # build_optimizer's order
            tensors = dict(by_name[name])
            own_part(parameter.data).copy_(own_part(split_like(tensors.pop(PARAMETER), parameter)))
            if tensors:
                state_dict["state"][i] = {
                    key: tensor if key == STEP else split_like(tensor, parameter) for key, tensor in tensors.items()
                }
        self.optimizer.load_state_dict(state_dict)

    def _zero_tensors(self, parameter: nn.Parameter) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        yield PARAMETER, safe_get_full_fp32_param(parameter)
        flat = self._updated_tensors()[0]
        for key, value in self.optimizer.state.get(flat, {}).items():
            if value.shape == flat.shape:
                yield key, safe_get_full_optimizer_state(parameter, key)
            else:
                yield key, value

    def _load_zero(self, by_name: dict[str, dict[str, torch.Tensor]]) -> None:
        some = next(iter(by_name.values()))
        self.make_optimizer_state()
        if STEP in some:
            for state in self.optimizer.state.values():
                state[STEP].copy_(some[STEP])
        moments = [key for key in some if key not in (PARAMETER, STEP)]
        if self.zero_stage == 3:
            self._load_zero3(by_name, moments)
        else:
            self._load_zero2(by_name, moments)

    def _load_zero3(self, by_name: dict[str, dict[str, torch.Tensor]], moments: list[str]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in self.parameters.items():
            tensors = by_name[name]
            safe_set_local_fp32_param(parameter, self._own_part(tensors[PARAMETER], parameter))
            for key in moments:
                safe_set_local_optimizer_state(parameter, self._own_part(tensors[key], parameter), key)
            with gathered([parameter], modifier_rank=0):  # what the module computes with, in its own precision
                parameter.data.copy_(tensors[PARAMETER])

    def _own_part(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This process's partition of an unsharded tensor; DeepSpeed pads the last one with zeros."""
        size = deepspeed_attribute(parameter, PARTITION).numel()
        own = tensor.flatten()[size * self.accelerator.process_index :][:size]
        return torch.cat([own, own.new_zeros(size - own.numel())])

    def _load_zero2(self, by_name: dict[str, dict[str, torch.Tensor]], moments: list[str]) -> None:
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        if moments:  # DeepSpeed would link parameters and moments in its first step
            groups = deepspeed_attribute(self.zero_optimizer, PARAMETER_GROUPS)
            for group, flat in zip(groups, self._updated_tensors(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)
        for name, parameter in self.parameters.items():
            tensors = by_name[name]
            parameter.data.copy_(tensors[PARAMETER])
            safe_set_full_fp32_param(parameter, tensors[PARAMETER].to(parameter.device))
            for key in moments:
                safe_set_full_optimizer_state(parameter, tensors[key].to(parameter.device), key)


def _sum(tensor: torch.Tensor) -> float:
    """In fp64, in which the smallest change counts, by parts: a whole copy in fp64 might not fit."""
    return sum(part.sum(dtype=torch.float64).item() for part in tensor.flatten().split(2**22))
