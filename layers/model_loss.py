"""The loss of a training step, for any model of transformers: computed by chunks, or from all logits at once.

    use_model_loss(model, chunked=True)     # False: logits of all tokens at once
    model.train()(**batch, labels=labels, label_positions=positions, num_items_in_batch=n).loss

The model's own forward runs, with its labels. While it runs, a stand-in takes the place of its head, and `ModelLoss`
that of its `loss_function`: neither has to know what the model does before, between and after them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput

from layers.chunked_loss import LanguageModelHead, find_label_positions
from layers.logits_stand_in import HeadStandIn, LogitsStandIn
from utils import UserError


def use_model_loss(model: PreTrainedModel, chunked: bool) -> None:
    """Let `model(labels=...)` compute its loss here. A class of ours has `@own_loss` on its forward instead.

    Raises:
        UserError: the model's head is no linear layer, so that its loss cannot be computed by chunks.
    """
    model.chunked_loss = chunked
    head = head_of(model)
    if type(head) is nn.Linear:  # a subclass may compute something else
        head.__class__ = LanguageModelHead
    if chunked and not isinstance(head, LanguageModelHead):
        found = f"of the class {type(head).__name__}" if head is not None else "not to be found"
        raise UserError(f"--loss chunked: the head of {type(model).__name__} is {found}: choose --loss full")
    forward = type(model).forward
    if not hasattr(forward, "computes_loss"):
        # PEFT calls the base model's `forward` itself, so that hooks would not run.
        model.forward = MethodType(own_loss(forward), model)


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits; some models leave it to a language model inside them."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((head for each in models if (head := each.get_output_embeddings()) is not None), None)


def own_loss(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """A model's forward that takes `label_positions` and `num_items_in_batch` too, and in training returns no logits.

    With labels: the loss is the mean over label tokens, or their sum / `num_items_in_batch` where that is given.
    `label_positions` are the flat positions (row * T + column) of the tokens with a label; without them they are
    looked up, which makes the CPU wait for the GPU.
    """
    signature = inspect.signature(forward)
    has_cache = "use_cache" in signature.parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )

    @wraps(forward)
    def forward_with_loss(
        self: PreTrainedModel,
        *args: Any,
        label_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        labels = kwargs.get("labels")
        if labels is None:
            return forward(self, *args, **kwargs)
        if has_cache:  # it would hold what nobody reads, and with it transformers does not look for packed samples
            kwargs["use_cache"] = False
        loss = ModelLoss(self, labels, label_positions, num_items_in_batch)
        with loss.in_place():
            output = forward(self, *args, **kwargs)
        return loss.complete(output)

    # accelerate unwraps a model's forward down to the function that wraps no other, and this one must stay.
    del forward_with_loss.__wrapped__
    forward_with_loss.__signature__ = signature
    forward_with_loss.computes_loss = True
    return forward_with_loss


class ModelLoss:
    """The loss of one call of a model's forward."""

    def __init__(
        self,
        model: PreTrainedModel,
        labels: torch.LongTensor,
        label_positions: torch.LongTensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> None:
        self.model = model
        self.labels = labels
        self.label_positions = label_positions
        self.num_items_in_batch = num_items_in_batch
        self.head = head_of(model)
        self.reference = model.loss_function
        self.is_chunked = model.training and model.chunked_loss
        self.computed: list[torch.Tensor] = []  # what loss_function has computed
        self.given: list[torch.Tensor] = []  # what it has returned

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this context the model's forward finds this loss, and by chunks the head's stand-in."""
        models = [self.model]
        if self.head not in self.model.children():  # then the loss may be taken by a model inside this one, too
            inner = (module for module in self.model.modules() if isinstance(module, PreTrainedModel))
            models += [each for each in inner if each is not self.model and self.head in each.modules()]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(_loss_function(model, self))
            if self.is_chunked:
                self.check_head()
                owners = models if len(models) == 1 else self.model.modules()
                for owner in [each for each in owners if self.head in each.children()]:
                    (name,) = [name for name, child in owner.named_children() if child is self.head]
                    stack.enter_context(_in_front_of(owner, name, HeadStandIn(self.head)))
            yield

    def check_head(self) -> None:
        """Raise UserError if the head does not compute this loss."""
        if not isinstance(self.head, (LanguageModelHead, ModulesToSaveWrapper)):
            raise UserError(
                f"--loss chunked: the head is a {type(self.head).__name__} that cannot compute it: choose --loss full"
            )
        if self.reference is not ForCausalLMLoss:
            raise UserError(
                f"--loss chunked: {type(self.model).__name__} has a loss of its own, "
                f"{getattr(self.reference, '__name__', self.reference)}: choose --loss full"
            )

    def __call__(
        self,
        logits: torch.Tensor | LogitsStandIn,
        labels: torch.LongTensor,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The model's `loss_function`."""
        if self.is_chunked:
            is_known = isinstance(logits, LogitsStandIn) and labels.shape == logits.hidden_states.shape[:-1]
            if not is_known or not kwargs.keys().isdisjoint(("shift_labels", "ignore_index")):
                raise UserError(
                    f"--loss chunked: {type(self.model).__name__} takes its loss in a way that is not known: "
                    "choose --loss full"
                )
            loss = self.without_logits(logits, labels)
        else:
            kwargs["num_items_in_batch"] = self.num_items_in_batch
            loss = self.reference(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        self.given.append(loss.clone())  # a model may add to it in place
        self.computed.append(loss)
        return self.given[-1]

    def without_logits(self, logits: LogitsStandIn, labels: torch.LongTensor) -> torch.Tensor:
        """What `loss_function` would make of the logits, from the positions before a label alone."""
        positions = self.label_positions if labels is self.labels else None
        if positions is None:
            positions = find_label_positions(labels)
        hidden_states = logits.hidden_states.flatten(0, 1).index_select(0, positions - 1)
        loss_sum = self.head(hidden_states, labels.flatten().index_select(0, positions), logits.steps)
        return loss_sum / (max(len(positions), 1) if self.num_items_in_batch is None else self.num_items_in_batch)

    def complete(self, output: ModelOutput) -> ModelOutput:
        """The forward's output with this loss; in training without logits.

        Raises:
            UserError: the forward has not asked for it.
        """
        if not self.computed:
            raise UserError(
                f"{type(self.model).__name__} cannot be trained: its forward takes the loss without loss_function"
            )
        changes: dict[str, Any] = {}
        is_changed = output.loss is not self.given[0] or output.loss._version > 0
        if len(self.computed) == 1 and is_changed:
            changes["loss"] = self.computed[0] + self.share * (output.loss - self.computed[0])
        if self.model.training:
            # Training needs no logits, and accelerate's mixed-precision wrapper would copy them to fp32.
            changes["logits"] = None
        return replace(output, **changes) if changes else output

    @property
    def share(self) -> torch.Tensor | float:
        """This call's part of the update's label tokens: what a model adds to its loss, such as a router's balance,
        is a mean over the call, not a sum over its tokens."""
        if self.num_items_in_batch is None:
            return 1.0
        positions = find_label_positions(self.labels) if self.label_positions is None else self.label_positions
        return len(positions) / self.num_items_in_batch


@contextmanager
def _loss_function(model: PreTrainedModel, loss: ModelLoss) -> Iterator[None]:
    """The model takes this loss inside."""
    before = model.loss_function
    model.loss_function = loss
    try:
        yield
    finally:
        model.loss_function = before


@contextmanager
def _in_front_of(owner: nn.Module, name: str, stand_in: HeadStandIn) -> Iterator[None]:
    """`owner.name` is the stand-in inside: an attribute of the object is found before a module of that name."""
    vars(owner)[name] = stand_in
    try:
        yield
    finally:
        del vars(owner)[name]
