"""Before step 1: does each trained tensor get a gradient that is finite, and not 0 throughout?

A tensor that no gradient reaches stays as it is, and nothing else in a run would say so.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather
from peft import PeftModel
from torch import nn

from layers.model_loss import head_of
from models.fsdp2 import is_sharded, own_part
from models.parts import language_model, path_of
from utils import UserError, name_some


BY_DESIGN = {".lora_A.": "LoRA's A, because B is 0 at first", ".experts.": "experts to which no token went"}


def outside_language_model(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the parameters' names those that are neither in the language model nor in its head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inside = [path_of(model, part) for part in (language_model(base), head_of(base))]
    return [name for name in names if not name.startswith(tuple(f"{path}." for path in inside))]


class GradientCheck:
    """Notes the largest element of each parameter's gradient, and puts zeros in the gradient's place.

    So a backward pass with the real loss changes nothing, under DeepSpeed too, whose engine keeps gradients in buffers
    of its own. Nothing waits for a GPU before `report`.

        check = GradientCheck(parameters)
        with check.watching():
            accelerator.backward(loss)
        check.report(is_scaled=False)
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.largest: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            parameter.register_post_accumulate_grad_hook(self._note_own_part(name))
            if is_sharded([parameter])
            else parameter.register_hook(self._note(name))
            for name, parameter in self.parameters.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def _note(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            largest = gradient.detach().abs().max()  # nan and inf come through
            before = self.largest.get(name)
            self.largest[name] = largest if before is None else torch.maximum(before, largest)
            return torch.zeros_like(gradient)  # not in place: another gradient may be a view of the same memory

        return hook

    def _note_own_part(self, name: str) -> Callable[[nn.Parameter], None]:
        """FSDP2 computes with gathered parameters, and gives each process its part of the gradient."""

        def hook(parameter: nn.Parameter) -> None:
            part = own_part(parameter.grad)
            self.largest[name] = part.abs().max() if part.numel() else part.new_zeros(())

        return hook

    def report(self, is_scaled: bool, needs_images: Collection[str] = ()) -> list[str]:
        """What is without a gradient by design, a line for each reason.

        Args:
            is_scaled: the loss was scaled for fp16, so a gradient may overflow: the scaler lowers the scale then.
            needs_images: the tensors that cannot have a gradient, because the data has no image.

        Raises:
            UserError: a gradient is not finite, or is 0 (or was never computed) without such a reason.
        """
        names = [name for name in self.parameters if name in self.largest]  # in the same order on every process
        values = torch.stack([self.largest[name].float() for name in names]) if names else torch.empty(0)
        if is_sharded(self.parameters.values()):
            values = gather(values.to(PartialState().device)[None]).amax(dim=0)  # over the parts; nan comes through
        values = values.tolist()
        found = dict(zip(names, values, strict=True))
        infinite = [name for name, value in found.items() if not value < float("inf")]
        if infinite and not is_scaled:
            raise UserError(
                f"the gradient of {name_some(infinite)} is not finite before step 1: the weights of --model hold NaN "
                "or Inf, or --mixed_precision is too narrow for it"
            )
        missing = [name for name in self.parameters if found.get(name, 0.0) == 0.0]
        by_reason: dict[str, list[str]] = {}
        for name in missing:
            reason = next((reason for part, reason in BY_DESIGN.items() if part in f".{name}"), "")
            if not reason and name in needs_images:
                reason = "the vision side, because the data has no image"
            by_reason.setdefault(reason, []).append(name)
        if lacking := by_reason.pop("", []):
            raise UserError(
                f"no gradient reaches {name_some(lacking)}: the loss does not depend on it, so it would stay as it "
                "is; leave it out of --lora_target_modules or --trainable_modules"
            )
        return [f"{len(group)} trained tensors have no gradient yet: {reason}" for reason, group in by_reason.items()]
