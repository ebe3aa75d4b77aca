"""Which layers recompute their activations in the backward pass, and which parts run as they would in use."""

from types import MethodType

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from layers.tiled_mlp import takes_hidden_states_alone
from models.parts import language_model, towers
from utils import UserError


def checkpoint_layers(model: PreTrainedModel, num_layers: int | None, num_mlps: int) -> None:
    """Checkpoint all layers of a tower. Of the language model's layers checkpoint `num_layers` whole (None: all), and
    mark `num_mlps` of the others to recompute their MLP alone, which layers/checkpoint.py does. A frozen tower
    recomputes nothing: it stays in evaluation mode.

    Raises:
        UserError: the model's class has no checkpointing, or not by layers, or an MLP cannot run by itself.
    """
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"--gradient_checkpointing true: {type(model).__name__} has none, choose --no_gradient_checkpointing"
        ) from None
    without_input_gradients(model)
    layers = decoder_layers(model)
    if num_layers is None:
        num_layers = len(layers)
    elif not layers:
        raise UserError(
            f"--checkpoint_num_layers {num_layers}: {type(model).__name__} checkpoints all layers or none, "
            "leave it out"
        )
    # The first ones: the backward pass frees what the last layers keep before it recomputes. Predicted for half of the
    # layers and 2048 tokens: MGM-2B 8.47 GiB of the device with the first, 8.47 with every other from the first on,
    # 8.52 with the last; LoRA on all linear layers 9.76, 9.77 and 10.00; Qwen3-VL-2B 6.65 in each case.
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        layer.recomputes_mlp = num_layers <= index < num_layers + num_mlps
        mlp = getattr(layer, "mlp", None)
        if layer.recomputes_mlp and (mlp is None or not takes_hidden_states_alone(mlp)):
            raise UserError(
                f"--checkpoint_num_mlps {num_mlps}: {type(layer).__name__} has no `mlp`, or one that takes more than "
                "hidden states; leave it out"
            )


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
