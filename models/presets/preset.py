"""What a preset is: a model's sizes and its processor's settings, by name and without a download."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, islice

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin


# A message's images and text, in their order.
CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    config: Callable[[], PreTrainedConfig]
    processor: Callable[[], ProcessorMixin]


def byte_tokenizer(
    special_tokens: Mapping[str, int], named: Mapping[str, str] | None = None, **roles: str
) -> PreTrainedTokenizerFast:
    """A tokenizer that reads single bytes, and a model's special tokens as the ids that they have in the model.

    Args:
        special_tokens: token to id. The bytes get the lowest ids that are left.
        named: further attributes, such as `image_token`, and their tokens.
        roles: tokens by role: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    """
    taken = set(special_tokens.values())
    byte_ids = islice((i for i in count() if i not in taken), 256)
    vocabulary = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), byte_ids, strict=True)) | dict(special_tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    more = {"extra_special_tokens": dict(named)} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **more)


def chat_template(user: tuple[str, str], reply: tuple[str, str], image: str, start: str = "", after: str = "") -> str:
    """How a family marks the turns of user and model. It knows no system turns.

    Args:
        user, reply: what comes before and after the content of a turn; the end of a reply carries a label.
        image: stands for an image in the text.
        start: opens a conversation.
        after: comes after a reply, without a label.
    """
    # As expressions: jinja drops a line break that follows a block.
    begin_user, end_user, begin_reply, end_reply = (f"{{{{ {text!r} }}}}" for text in (*user, *reply))
    return (
        f"{{{{ {start!r} }}}}"
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{begin_reply}{{% generation %}}{CONTENT}{end_reply}{{% endgeneration %}}{{{{ {after!r} }}}}"
        f"{{% else %}}{begin_user}{CONTENT}{end_user}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin_reply}{{% endif %}}"
    ).replace("IMAGE", repr(image))


def square(side: int) -> dict[str, int]:
    """A size in pixels, as image processors want it."""
    return {"height": side, "width": side}
