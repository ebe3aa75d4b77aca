"""A text-only model's tokenizer in the form of a processor, so that all models are used in one way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin


class TextProcessor(ProcessorMixin):
    """A processor without images. It is saved as the tokenizer that it holds.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: by default the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, text: str | list[str], images: Sequence | None = None, **kwargs: Any) -> BatchFeature:
        """The tokenizer's tensors or lists. Raises ValueError if there are images."""
        if images:
            raise ValueError("the model reads text only, and there are images")
        return super().__call__(text=text, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(save_directory, **kwargs)
