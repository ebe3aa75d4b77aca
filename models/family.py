"""What is known of a model family beyond transformers' own methods: one table, by the config's `model_type`.

    family_of(model.config).packs

A family that is not in the table works by transformers' methods alone, and does nothing that needs to be known first.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


# PaliGemma has no turns: the question is a prefix, and the answer follows its line break.
PALIGEMMA = (
    "{% for message in messages %}{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set parts = message['content'] %}"
    "{% set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{{ '<image>' * (parts | selectattr('type', 'equalto', 'image') | list | length) }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ text + eos_token }}{% endgeneration %}"
    "{% else %}{{ text + '\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """What sets a family apart. The defaults are those of every family that the table does not name."""

    # Trained in full beside LoRA, unless --trainable_modules says otherwise.
    trainable_modules: tuple[str, ...] = ()
    # Whether several samples in a row, told apart by `position_ids`, are trained as each by itself (tests).
    packs: bool = False
    # Values of --mixed_precision in which its activations overflow.
    refused_precisions: tuple[str, ...] = ()
    # Whether the embeddings' output gets a gradient though it is frozen, as transformers and PEFT would have it: of no
    # use, but MGM's memory has been measured with it.
    keeps_input_gradients: bool = False
    # Linear layers whose weights are read by fused kernels, which do not see LoRA; PEFT refuses them too.
    layers_without_lora: tuple[str, ...] = ()
    # Of a family whose processor ships none.
    chat_template: str | None = None


MAMBA = Family(layers_without_lora=("out_proj", "conv1d"))

FAMILIES = {
    "paligemma": Family(chat_template=PALIGEMMA),
    "mgm": Family(
        trainable_modules=("multi_modal_projector", "patch_info_mining"), packs=True, keeps_input_gradients=True
    ),
    **{name: MAMBA for name in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")},
}


def family_of(config: PreTrainedConfig) -> Family:
    return FAMILIES.get(config.model_type, Family())
