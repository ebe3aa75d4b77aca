"""The text that a processor hands to its tokenizer: a conversation, with each image's one token made into many.

Every processor of transformers expands images in its own way. Some add a text's beginning or end too. What they all do
is to call their tokenizer with the result: WatchedTokenizer stands in its place, and finds the conversation in there.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Encoding
from transformers import BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from chat.arguments import names_itself
from chat.render import Messages, Span, as_strings, render, takes_parts


TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Expansion:
    """Where a text stands in its expansion. Between two of its segments is an image."""

    text: str
    segments: list[Span]
    expanded_segments: list[Span]

    def moved(self, spans: list[Span]) -> list[Span]:
        """Where spans of the text's characters are in the expansion, without the images among them."""
        shifts = [begin - start for (start, _), (begin, _) in zip(self.segments, self.expanded_segments, strict=True)]
        return move(spans, self.segments, shifts)

    @property
    def images(self) -> list[Span]:
        """The characters that stand for each image."""
        edges = self.expanded_segments
        return [(before[1], after[0]) for before, after in zip(edges[:-1], edges[1:], strict=True)]


def move(spans: list[Span], segments: list[Span], shifts: list[int]) -> list[Span]:
    """The parts of ascending spans that lie in segments, each moved by its segment's shift."""
    parts, first = [], 0
    for begin, end in spans:
        while first < len(segments) - 1 and segments[first][1] <= begin:
            first += 1
        for (start, stop), shift in zip(segments[first:], shifts[first:], strict=True):
            if start >= end:
                break
            if max(begin, start) < min(end, stop):
                parts.append((max(begin, start) + shift, min(end, stop) + shift))
    return parts


def find_expansion(text: str, expanded: str, placeholder: str) -> Expansion | None:
    """Find each segment of the text, in order, in its expansion. None if one is not there.

    What follows the last segment is cut off: a conversation ends as its template ends it. Where nothing follows the
    last image, all the rest stands for it.
    """
    segments, expanded_segments, position, cursor = [], [], 0, 0
    for segment in text.split(placeholder):
        ends_with_image = position == len(text) > 0
        begin = len(expanded) if ends_with_image else expanded.find(segment, cursor)
        if begin < 0:
            return None
        cursor = begin + len(segment)
        segments.append((position, position + len(segment)))
        expanded_segments.append((begin, cursor))
        position += len(segment) + len(placeholder)
    return Expansion(expanded[:cursor], segments, expanded_segments)


class WatchedTokenizer:
    """A processor's tokenizer for one call. It keeps what it was given and what it made of that.

    A row without an image is tokenized as it is, whatever the processor does to it. A first token (<bos>) is added
    once at most, and none at the end: that is the template's to write.

    Args:
        texts: the rendered conversations, an image being one placeholder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], placeholder: str | None) -> None:
        self._tokenizer, self._texts, self._placeholder = tokenizer, texts, placeholder
        self.expansions: list[Expansion] | None = None
        self.encodings: list[Encoding] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        given = [text] if isinstance(text, str) else list(text)
        if len(given) != len(self._texts):
            return self._tokenizer(text, add_special_tokens=add_special_tokens, **kwargs)
        first = first_token(self._tokenizer) if add_special_tokens else ""
        self.expansions = [self._expansion(*pair, first) for pair in zip(self._texts, given, strict=True)]
        # verbose=False: a text beyond the tokenizer's maximum is cut or left out later, and reported once.
        kwargs |= {"add_special_tokens": False, "verbose": False}
        made = self._tokenizer([each.text for each in self.expansions], **kwargs)
        self.encodings = made.encodings
        return made

    def _expansion(self, text: str, given: str, first: str) -> Expansion:
        has_image = self._placeholder is not None and self._placeholder in text
        found = find_expansion(text, given if has_image else text, self._placeholder or "\0")
        if found is None:
            raise ValueError("the processor rewrites the text beside its images, so replies cannot be told apart")
        if not first or found.text.startswith(first):
            return found
        moved = [(begin + len(first), end + len(first)) for begin, end in found.expanded_segments]
        return Expansion(first + found.text, found.segments, moved)


def first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before every text by itself, such as <bos>; empty if it puts none."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else ""


def watched(processor: ProcessorMixin, texts: list[str]) -> tuple[ProcessorMixin, WatchedTokenizer]:
    """A copy of the processor for one call with these texts, and the tokenizer that watches it."""
    watch = WatchedTokenizer(processor.tokenizer, texts, getattr(processor, "image_token", None))
    processor = copy.copy(processor)
    processor.tokenizer = watch
    return processor, watch


def rendered(
    processor: ProcessorMixin, conversations: list[Messages], add_generation_prompt: bool = False
) -> tuple[list[str], list[list[Span]]]:
    """The text of each conversation, an image being one token, and the characters of its replies.

    Raises:
        ValueError: there is no chat template, or it cannot tell replies apart.
        TemplateError: it fails.
    """
    if processor.chat_template is None:
        raise ValueError("the model has no chat template: add a chat_template.jinja to its folder")
    if not takes_parts(processor.chat_template):
        token = getattr(processor, "image_token", None)
        conversations = [as_strings(messages, token) for messages in conversations]
    return render(
        conversations, processor.chat_template, processor.tokenizer.special_tokens_map, add_generation_prompt
    )


def processed(
    processor: ProcessorMixin, texts: list[str], images: list[list[Image.Image]], padding_side: str = "right"
) -> tuple[Mapping[str, Any], WatchedTokenizer]:
    """What the processor makes of the texts and their images, and the tokenizer that watched it."""
    if processor.tokenizer.pad_token is None:  # padding is masked, so any token will do
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    check_images(processor, texts, images)
    processor, watch = watched(processor, texts)
    padding = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    if any(images):
        made = processor(text=texts, images=images, **padding)
    else:
        made = text_alone(processor, watch, texts, padding)
    if watch.expansions is None or watch.encodings is None:
        raise ValueError(
            f"{type(processor).__name__} calls no fast tokenizer with its texts, so replies cannot be told apart"
        )
    return made, watch


def text_alone(
    processor: ProcessorMixin, watch: WatchedTokenizer, texts: list[str], padding: dict[str, Any]
) -> Mapping[str, Any]:
    """What the processor makes of rows without an image."""
    try:
        return processor(text=texts, **padding)
    except ValueError:  # PaliGemma's insists on images
        made = dict(watch(texts, **padding))
        types = {name: torch.zeros_like(made["input_ids"]) for name in TOKEN_TYPES if names_itself(processor, name)}
        return made | types


def check_images(processor: ProcessorMixin, texts: list[str], images: list[list[Image.Image]]) -> None:
    """Raise ValueError if a text has more or fewer images than there are."""
    token = getattr(processor, "image_token", None)
    if token is None and any(images):
        raise ValueError("the model has no vision side, so it takes no images")
    for i, (text, own) in enumerate(zip(texts, images, strict=True)):
        expected = text.count(token) if token else 0
        if expected != len(own):
            raise ValueError(f"sample {i} has {expected} {token} placeholders but {len(own)} images")
