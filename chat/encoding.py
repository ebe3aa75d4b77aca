"""Conversations and images to forward's arguments and labels, by any processor of transformers."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Encoding
from transformers import BatchFeature, ProcessorMixin

from chat.arguments import cut, forward_arguments, set_token_types
from chat.expansion import processed, rendered
from chat.image_text import SIZES, ShortText, image_text, shortened
from chat.images import Size
from chat.label_mask import CutImage, count_fitting_tokens, find_label_tokens, tokens_of
from chat.render import Messages
from layers.chunked_loss import IGNORE_INDEX


def encode(
    processor: ProcessorMixin,
    conversations: list[Messages],
    images: list[list[Image.Image]],
    max_length: int | None = None,
    add_generation_prompt: bool = False,
    padding_side: str = "right",
) -> BatchFeature:
    """A batch of conversations as the model's own processor makes it, and `labels` [B, T] on the replies.

    Args:
        conversations: in transformers' form, each image a part of its own.
        images: of each conversation, in reading order.
        max_length: in tokens, image positions included; later tokens are cut off.
        add_generation_prompt: end with the header of the model's turn, for generation.
        padding_side: `right` for training, `left` for generation.

    Raises:
        ValueError: a conversation and its images do not fit together, `max_length` would cut an image, the template
            fails, or the processor makes what cannot be trained on.
    """
    texts, replies = rendered(processor, conversations, add_generation_prompt)
    made, watch = processed(processor, texts, images, padding_side)
    batch = forward_arguments(processor, made)
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    num_kept = []
    for i, (encoding, expansion) in enumerate(zip(watch.encodings, watch.expansions, strict=True)):
        present = batch["attention_mask"][i].nonzero().squeeze(1)
        first, last = int(present[0]), int(present[-1]) + 1
        spans = [tokens_of(encoding, *span, range(first, last)) for span in expansion.images]
        image_tokens = [(span.start - first, span.stop - first, 0) for span in spans if span]
        num_kept.append(count_fitting_tokens(last - first, image_tokens, max_length))
        indices = find_label_tokens(encoding, expansion.moved(replies[i]), first, first + num_kept[-1])
        labels[i, indices] = batch["input_ids"][i, indices]
    batch["labels"] = labels
    set_token_types(processor, batch)
    return BatchFeature(cut(batch, max(num_kept)))


def count_tokens(
    processor: ProcessorMixin,
    conversations: list[Messages],
    image_sizes: list[list[Size]] | None = None,
    max_length: int | None = None,
    add_generation_prompt: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each conversation, and how many of those that fit into `max_length` carry a label: 0 if an image would
    be cut. No image is opened.

    Args:
        image_sizes: of each conversation's images; None will do where `has_fixed_images`.

    Raises:
        ValueError: the template fails.
    """
    short = shortened_conversations(processor, conversations, image_sizes, add_generation_prompt)
    counts = [_count(*pair, max_length) for pair in zip(encodings_of(processor, short), short, strict=True)]
    num_tokens, num_label_tokens = np.array(counts).T
    return num_tokens, num_label_tokens


def learned_tokens(processor: ProcessorMixin, conversation: Messages) -> list[list[int]]:
    """The tokens that carry labels, a list for each reply. No image is needed. Raises what count_tokens raises."""
    sizes = [SIZES[0]] * sum(part["type"] == "image" for message in conversation for part in message["content"])
    (short,) = shortened_conversations(processor, [conversation], [sizes])
    (encoding,) = encodings_of(processor, [short])
    indices = [find_label_tokens(encoding, [reply], 0, len(encoding)) for reply in short.replies]
    return [[encoding.ids[index] for index in own] for own in indices]


def shortened_conversations(
    processor: ProcessorMixin,
    conversations: list[Messages],
    image_sizes: list[list[Size]] | None,
    add_generation_prompt: bool = False,
) -> list[ShortText]:
    texts, replies = rendered(processor, conversations, add_generation_prompt)
    sizes = [None] * len(texts) if image_sizes is None else image_sizes
    return [shortened(processor, *each) for each in zip(texts, replies, sizes, strict=True)]


def encodings_of(processor: ProcessorMixin, short: list[ShortText]) -> list[Encoding]:
    tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.no_truncation()  # as the transformers tokenizer does before each call
    tokenizer.no_padding()
    return tokenizer.encode_batch([each.text for each in short], add_special_tokens=False)


def _count(encoding: Encoding, short: ShortText, max_length: int | None) -> tuple[int, int]:
    """Tokens of one conversation, and how many of those that fit carry a label."""
    length = len(encoding)
    images = []
    for begin, end, num_inside in short.images:
        tokens = tokens_of(encoding, begin, end, range(length))
        images.append((tokens.start, tokens.stop, num_inside))
    num_tokens = length + sum(num_inside for _, _, num_inside in images)
    try:
        num_kept = count_fitting_tokens(length, images, max_length)
    except CutImage:
        return num_tokens, 0
    return num_tokens, len(find_label_tokens(encoding, short.replies, 0, num_kept))


def num_image_tokens(processor: ProcessorMixin, size: Size, num_images: int = 1) -> int:
    """Positions that an image of this size takes in a row of so many, its marks included."""
    return image_text(processor, size, num_images).num_tokens
