"""Which layers recompute their activations in the backward pass, and which parts run as they would in use."""

from types import MethodType

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models.parts import language_model, towers
from utils import UserError


def checkpoint_layers(model: PreTrainedModel, every_n_layers: int) -> None:
    """Checkpoint every n-th layer of the language model, and all layers of a tower. A frozen tower recomputes nothing:
    it stays in evaluation mode.

    Raises:
        UserError: the model's class has no checkpointing, or not by layers.
    """
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"--gradient_checkpointing true: {type(model).__name__} has none, choose --no_gradient_checkpointing"
        ) from None
    without_input_gradients(model)
    layers = decoder_layers(model)
    if every_n_layers > 1 and not layers:
        raise UserError(
            f"--checkpoint_every_n_layers {every_n_layers}: {type(model).__name__} checkpoints all layers or none"
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every_n_layers == 0


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of the language model that can be checkpointed, in their order."""
    return [layer for layer in language_model(model).modules() if isinstance(layer, GradientCheckpointingLayer)]


def without_input_gradients(model: PreTrainedModel) -> None:
    """Undo what transformers' checkpointing and PEFT each do: let the output of every embedding need a gradient, the
    frozen tower's patches too, whose whole backward pass then runs for nothing. Checkpointing that is not reentrant
    does without. To be called after each of them: the model remembers the hooks of the last call alone."""
    model.disable_input_require_grads()


def keep_frozen_towers_in_eval(model: PreTrainedModel) -> None:
    """Let towers without a trained parameter stay in evaluation mode: their dropout would only add noise to the
    features, and checkpointing would recompute what has no gradient."""
    for tower in towers(model):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.train = MethodType(_stay_in_eval, tower)
            tower.eval()


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)
