"""The cross entropy of a language model's head, computed without ever holding the logits of all tokens.

Logits are large: for MGM-2B those of 1024 tokens are 500 MiB in bf16, and a loss in fp32 holds several times that.
Here the tokens are taken in chunks. For each chunk the forward pass computes the logits, from them the loss and the
gradient of the hidden states, and then frees the logits. That works because the loss is the last operation of the
model: its gradient is known up to one factor, by which the backward pass multiplies. Nothing is recomputed.

A chunk's logits are in the dtype of the hidden states. Some rows of them at a time are taken to fp32, and become the
logits' gradient, in the logits' place. So a chunk can be large, as matrix products need it to be fast, and only a
small piece is in fp32.

layers/model_loss.py puts it in the place of a model's own loss.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from utils import MIB


IGNORE_INDEX = -100  # torch's cross entropy leaves such labels out
FIRST_LABEL = 1  # no token predicts position 0
# Each matrix product reads the whole head, so larger chunks are faster; these are as large as what a layer's backward
# pass holds anyway (layers/tiled_mlp.py). 256 tokens of MGM-2B in bf16. benchmarks/loss.py measures other sizes.
CHUNK_BYTES = 128 * MIB  # of logits in the dtype of the hidden states
PIECE_BYTES = 64 * MIB  # of logits in fp32
ROWS = 64  # a chunk and a piece have a multiple of it, as a GPU's matrix product has at a time
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
        log_probabilities = torch.empty(len(targets), 1, dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states)
        weight_gradient = torch.zeros_like(weight) if weight_is_trained else None
        bias_gradient = torch.zeros_like(bias) if bias_is_trained else None
        head = weight.to(hidden_states.dtype)
        # This code chooses its dtypes itself; autocast would choose others.
        with torch.autocast(hidden_states.device.type, enabled=False):
            for chunk in _slices(len(targets), CHUNK_BYTES, len(weight) * hidden_states.itemsize):
                values = hidden_states[chunk] @ head.T  # holds the logits, then their gradient
                for piece in _slices(len(values), PIECE_BYTES, len(weight) * 4):
                    rows = slice(chunk.start + piece.start, chunk.start + piece.stop)
                    _replace_by_gradient(values[piece], targets[rows], log_probabilities[rows], bias, steps)
                torch.mm(values, head, out=hidden_gradient[chunk])
                if weight_is_trained:
                    _add_weight_gradient(weight_gradient, values, hidden_states[chunk])
                if bias_is_trained:
                    bias_gradient += values.sum(dim=0)
                del values  # frees it before the next chunk's logits are computed
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return -log_probabilities.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Safe in fp16: the saved gradients have the size of probabilities, and `factor` contains the loss scale.
        hidden, weight, bias = (
            None if gradient is None else (gradient * factor).to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return hidden, weight, None, bias, None


def _slices(length: int, nbytes: int, row_bytes: int) -> list[slice]:
    """As many rows at a time as there is room for in `nbytes`."""
    size = max(nbytes // row_bytes, 1)
    size -= size % ROWS if size > ROWS else 0
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _replace_by_gradient(
    products: torch.Tensor,
    targets: torch.LongTensor,
    log_probabilities: torch.Tensor,
    bias: torch.Tensor | None = None,
    steps: tuple[Step, ...] = (),
) -> None:
    """Overwrite the head's products [N, V] with the gradient of their summed cross entropy with targets [N], and write
    the targets' log probabilities [N, 1].

    Computed in place: without steps no more than one tensor of that size exists in fp32 at any time.
    """
    values = products.float()  # holds the logits, then their log probabilities
    if bias is not None:
        values += bias
    if steps:
        inputs = values.requires_grad_()
        with torch.enable_grad():
            for step in steps:
                values = step(values)
        logits, values = values, values.detach().clone()
    targets = targets[:, None]
    torch.log_softmax(values, dim=1, out=values)
    torch.gather(values, 1, targets, out=log_probabilities)
    gradient = values if steps else products  # one operator takes it to the products' dtype
    torch.exp(values, out=gradient)
    gradient.scatter_(1, targets, log_probabilities.expm1().to(gradient.dtype))
    if steps:
        products.copy_(torch.autograd.grad(logits, inputs, gradient)[0])


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
