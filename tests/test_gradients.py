"""Before step 1 each trained tensor must get a gradient, and the check itself changes nothing."""

import pytest
import torch
from torch import nn

from training.gradients import GradientCheck
from utils import UserError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
        self.tower = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.lora_B["default"](self.lora_A["default"](x))).square().sum()


def checked(model: Model, loss: torch.Tensor) -> GradientCheck:
    check = GradientCheck(dict(model.named_parameters()))
    with check.watching():
        loss.backward()
    return check


def test_lists_what_is_zero_by_design() -> None:
    model = Model()
    model.tower.requires_grad_(False)
    check = GradientCheck({name: p for name, p in model.named_parameters() if p.requires_grad})
    with check.watching():
        model(torch.ones(2, 3)).backward()
    assert check.report(is_scaled=False) == [
        "1 trained tensors have no gradient yet: LoRA's A, because B is 0 at first"
    ]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())  # zeros took the gradients' place


def test_names_a_tensor_that_no_gradient_reaches() -> None:
    model = Model()
    check = checked(model, model(torch.ones(2, 3)))
    with pytest.raises(UserError, match=r"no gradient reaches tower\.weight"):
        check.report(is_scaled=False)
    lines = check.report(is_scaled=False, needs_images={"tower.weight"})
    assert lines[1] == "1 trained tensors have no gradient yet: the vision side, because the data has no image"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_a_gradient_that_is_not_finite(value: float) -> None:
    model = Model()
    check = checked(model, model(torch.ones(2, 3)) * value + model.tower.weight.sum())
    with pytest.raises(UserError, match=r"the gradient of lora_B\.default\.weight is not finite|lora_A"):
        check.report(is_scaled=False)
    check.report(is_scaled=True)  # a loss scale may be too high at first
