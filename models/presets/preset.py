"""What a preset is: a model's sizes and its processor's settings, by name and without a download."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, islice

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin


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
