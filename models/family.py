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
    # Layers of a state-space mixer whose weights fused kernels read: they see neither LoRA nor 4 bits.
    fused_layers: tuple[str, ...] = ()
    # Classes of modules, besides layers, that ZeRO-3 gathers as a whole.
    gathered_whole: tuple[str, ...] = ()
    # Of a family whose processors have none.
    chat_template: str | None = None


PACKS = Family(packs=True)

FAMILIES = {
    "mgm": Family(
        trainable_modules=("multi_modal_projector", "patch_info_mining"),
        packs=True,
        gathered_whole=("ConvNextStage",),
    ),
    "paligemma": Family(chat_template=PALIGEMMA),
    # Gemma 3's residual stream grows beyond fp16's largest number.
    **{name: Family(refused_precisions=("fp16",)) for name in ("gemma3", "gemma3n", "gemma3n_text", "shieldgemma2")},
    "gemma3_text": Family(packs=True, refused_precisions=("fp16",)),
    **{
        name: Family(fused_layers=layers)
        for layers, names in (
            (("out_proj", "conv1d"), ("falcon_h1", "mamba2", "nemotron_h")),
            (("out_proj", "conv1d", "x_proj", "dt_proj"), ("falcon_mamba", "mamba")),
            (("out_proj",), ("bamba", "granitemoehybrid", "zamba2")),
            (("dt_proj",), ("jamba", "zamba")),
        )
        for name in names
    },
    # Of these tests/test_family_steps.py shows that packed samples are trained as each by itself. Others put images or
    # time into positions (M-RoPE), mask images in both directions, or carry a state from sample to sample.
    **{
        name: PACKS
        for name in (
            *("aya_vision", "idefics2", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
            *("ovis2", "smolvlm", "cohere2", "deepseek_v3", "gemma", "gemma2", "gpt2", "granite", "llama", "mistral"),
            *("mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
        )
    },
}


def family_of(config: PreTrainedConfig) -> Family:
    return FAMILIES.get(config.model_type, Family())


def is_mgm(config: PreTrainedConfig) -> bool:
    """Whether the model's class is this project's own."""
    return config.model_type == "mgm"


def packs(config: PreTrainedConfig) -> bool:
    """Whether the family may pack samples, and the family of the language model in it too."""
    return family_of(config).packs and family_of(config.get_text_config()).packs


def reads_padding_mask(config: PreTrainedConfig) -> bool:
    """Whether the padding behind a row's tokens changes what is trained, unless a mask hides it.

    It does not where a token sees only what comes before it, as in the families that pack. A router's loss counts all
    tokens.
    """
    return not packs(config) or has_router_loss(config)


def has_router_loss(config: PreTrainedConfig) -> bool:
    """Whether the model adds to its loss how evenly its routers deal out tokens."""
    return getattr(config.get_text_config(), "output_router_logits", False)
