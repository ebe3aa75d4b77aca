"""The cross entropy of a language model's head, computed without ever holding the logits of all tokens.

Logits are large: for MGM-2B those of 1024 tokens are 500 MiB in bf16, and a loss in fp32 holds several times that.
Here the tokens are taken in chunks. For each chunk the forward pass computes the logits, from them the loss and the
gradient of the hidden states, and then frees the logits. That works because the loss is the last operation of the
model: its gradient is known up to one factor, by which the backward pass multiplies. Nothing is recomputed.

layers/model_loss.py puts it in the place of a model's own loss.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable


IGNORE_INDEX = -100  # torch's cross entropy leaves such labels out
FIRST_LABEL = 1  # no token predicts position 0
# Each matrix product reads the whole head, so larger chunks are faster. A chunk holds its logits in the dtype of the
# hidden states and in fp32: 94 MiB for MGM-2B in bf16. benchmarks/loss.py measures other sizes. With a smaller
# vocabulary a chunk has more tokens: up to CHUNK_ELEMENTS logits.
CHUNK_TOKENS = 64
CHUNK_ELEMENTS = 2**22
WEIGHT_GRADIENT_ROWS = 2**13  # vocabulary entries whose gradient is computed at a time
Step = Callable[[torch.Tensor], torch.Tensor]  # what a model does to its logits, element by element


class LanguageModelHead(nn.Linear):
    """`lm_head`. Given targets it returns their summed cross entropy instead of logits.

    The loss is computed inside this module's forward because only there has ZeRO-3 gathered the weight.
    """

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.LongTensor | None = None, steps: tuple[Step, ...] = ()
    ) -> torch.Tensor:
        """[..., D] to logits [..., V]; with targets [N], hidden states [N, D] to a sum in fp32 (0 if N is 0).

        `steps` are taken from the head's product to the logits: scaling, soft capping.
        """
        if targets is None:
            return super().forward(hidden_states)
        if self.weight.dtype != torch.float32:  # under autocast a norm may give fp32: the head would be copied in that
            hidden_states = hidden_states.to(self.weight.dtype)
        return ChunkedCrossEntropy.apply(hidden_states, self.weight, targets, self.bias, steps)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of `steps(hidden_states @ weight.T + bias)` [N, V] with targets [N]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.LongTensor,
        bias: torch.Tensor | None = None,
        steps: tuple[Step, ...] = (),
    ) -> torch.Tensor:
        _, weight_is_trained, _, bias_is_trained, *_ = (*ctx.needs_input_grad, False)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states)
        weight_gradient = torch.zeros_like(weight) if weight_is_trained else None
        bias_gradient = torch.zeros_like(bias) if bias_is_trained else None
        head = weight.to(hidden_states.dtype)
        chunk_size = max(CHUNK_TOKENS, CHUNK_ELEMENTS // len(weight))
        # This code chooses its dtypes itself; autocast would choose others.
        with torch.autocast(hidden_states.device.type, enabled=False):
            for start in range(0, len(hidden_states), chunk_size):
                chunk = slice(start, start + chunk_size)
                chunk_loss, gradient = _loss_and_gradient(hidden_states[chunk], head, targets[chunk], bias, steps)
                loss += chunk_loss
                torch.mm(gradient, head, out=hidden_gradient[chunk])
                if weight_is_trained:
                    _add_weight_gradient(weight_gradient, gradient, hidden_states[chunk])
                if bias_is_trained:
                    bias_gradient += gradient.sum(dim=0)
                del gradient  # frees it before the next chunk's logits are computed
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Safe in fp16: the saved gradients have the size of probabilities, and `factor` contains the loss scale.
        hidden, weight, bias = (
            None if gradient is None else (gradient * factor).to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return hidden, weight, None, bias, None


def _loss_and_gradient(
    hidden_states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.LongTensor,
    bias: torch.Tensor | None = None,
    steps: tuple[Step, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk's summed cross entropy, and its gradient by the head's product in the dtype of the hidden states.

    Computed in place: without steps no more than two tensors as large as the logits exist at any time.
    """
    values = (hidden_states @ head.T).float()  # holds the logits, then the probabilities, then the gradient
    if bias is not None:
        values += bias
    product = values
    if steps:
        values = product.requires_grad_()
        with torch.enable_grad():
            for step in steps:
                values = step(values)
        logits, values = values, values.detach().clone()
    targets = targets[:, None]
    values -= values.amax(dim=1, keepdim=True)
    target_values = values.gather(1, targets)
    sums = values.exp_().sum(dim=1, keepdim=True)
    loss = (sums.log() - target_values).sum()
    values /= sums
    values.scatter_add_(1, targets, values.new_full(targets.shape, -1))
    if steps:
        (values,) = torch.autograd.grad(logits, product, values)
    return loss, values.to(hidden_states.dtype)


def _add_weight_gradient(weight_gradient: torch.Tensor, gradient: torch.Tensor, hidden_states: torch.Tensor) -> None:
    """Add a chunk's part, some vocabulary entries at a time: otherwise the product would be as large as the head."""
    for rows, columns in zip(
        weight_gradient.split(WEIGHT_GRADIENT_ROWS), gradient.split(WEIGHT_GRADIENT_ROWS, dim=1), strict=True
    ):
        rows += columns.T @ hidden_states


def find_label_positions(labels: torch.LongTensor) -> torch.LongTensor:
    """The flat positions (row * T + column) of the labels [B, T] that enter the loss.

    On a GPU this waits for the device, since the result's length depends on the data: collators call it on the CPU.
    """
    has_label = labels != IGNORE_INDEX
    has_label[:, :FIRST_LABEL] = False
    return has_label.flatten().nonzero().squeeze(1)
