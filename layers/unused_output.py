"""An MLP's output that nobody reads: in most layers it is added to the residual, and the sum leaves the layer.

When such a layer is computed again in the backward pass, only its graph is needed. The MLP may leave out its last
matrix product then, a ninth of a step's (layers/gated_mlp.py, layers/tiled_mlp.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap

from torch import nn

from layers.formula import ends_like


def adds_mlp_to_residual(layer: nn.Module) -> bool:
    """Whether the last that its forward does is to add the MLP's output to the residual."""
    return hasattr(layer, "mlp") and ends_like(unwrap(type(layer).forward), _ending, "mlp")


@contextmanager
def without_output(mlp: nn.Module) -> Iterator[None]:
    """In this context the MLP may return anything, if only its gradients are right."""
    mlp.output_is_unused = True
    try:
        yield
    finally:
        mlp.output_is_unused = False


def output_is_unused(mlp: nn.Module) -> bool:
    return getattr(mlp, "output_is_unused", False)


def _ending(self, residual, hidden_states):  # noqa: ANN001, ANN202
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states
