"""What a model's head returns where the logits are not made: a stand-in that notes what the model does to them.

    logits = HeadStandIn(lm_head)(hidden_states)       # no product is computed
    logits = torch.tanh(logits / 30) * 30              # three steps are noted
    lm_head(hidden_states[positions], targets, logits.steps)

Between the head and the loss some models scale their logits (Granite, Cohere), cap them (Gemma 2, 3n and 4) or leave
out padding of the vocabulary. Whatever else a model does to them is refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layers.chunked_loss import Step
from utils import UserError


class LogitsStandIn:
    """Stands for the logits [..., V] of hidden states [..., D], and for what `steps` make of them."""

    def __init__(self, hidden_states: torch.Tensor, num_words: int, steps: tuple[Step, ...] = ()) -> None:
        self.hidden_states = hidden_states
        self.num_words = num_words
        self.steps = steps

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden_states.shape[:-1], self.num_words))

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_states.dtype

    def _then(self, step: Step) -> "LogitsStandIn":
        return LogitsStandIn(self.hidden_states, self.num_words, (*self.steps, step))

    def __truediv__(self, number: float | torch.Tensor) -> "LogitsStandIn":
        check_not_trained(number)
        return self._then(lambda logits: logits / number)

    def __mul__(self, number: float | torch.Tensor) -> "LogitsStandIn":
        check_not_trained(number)
        return self._then(lambda logits: logits * number)

    __rmul__ = __mul__

    def tanh(self) -> "LogitsStandIn":
        return self._then(torch.tanh)

    def __getitem__(self, index: Any) -> "LogitsStandIn":
        """The first words of the vocabulary: `logits[..., :n]`."""
        is_slice = isinstance(index, tuple) and len(index) == 2 and index[0] is ... and isinstance(index[1], slice)
        if not is_slice:
            raise unknown_step(f"the index {index}")
        num_words = len(range(self.num_words)[index[1]])
        return LogitsStandIn(self.hidden_states, num_words, (*self.steps, lambda logits: logits[index]))

    def float(self) -> "LogitsStandIn":
        return self  # each chunk is in fp32 anyway

    def to(self, *args: Any, **kwargs: Any) -> "LogitsStandIn":
        return self

    contiguous = float

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by Python itself
            raise AttributeError(name)
        raise unknown_step(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> "LogitsStandIn":
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        raise unknown_step(getattr(func, "__name__", str(func)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise unknown_step("a value written into them")


def check_not_trained(number: float | torch.Tensor) -> None:
    """Raise UserError for a factor that is trained: it would get no gradient."""
    if isinstance(number, torch.Tensor) and number.requires_grad:
        raise unknown_step("a product with what is trained")


def unknown_step(name: str) -> UserError:
    return UserError(
        f"--loss chunked: the model puts its logits through {name}, which is not known: choose --loss full"
    )


class HeadStandIn:
    """Takes the head's place while the model's forward runs. Its attributes are the head's."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, hidden_states: torch.Tensor) -> LogitsStandIn:
        return LogitsStandIn(hidden_states, self.head.out_features)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)
