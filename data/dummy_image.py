"""An image for a batch that has none, so that every process runs the same modules.

Under ZeRO-3 each process helps to gather each module's weights, and under DDP each gives a gradient for whatever is
trained. A batch of text alone, beside one with images on another process, would wait forever, or be an error. So a
small image is put behind the text of one of its rows: no token of the text sees it, and nothing is learned of it.
"""

import torch
from transformers import ProcessorMixin

from chat.arguments import forward_arguments, per_token, set_token_types
from chat.expansion import processed
from chat.image_text import takes_images
from chat.images import Size, blank_image
from layers.chunked_loss import IGNORE_INDEX


SIZE: Size = (56, 56)


def needs_dummy_images(processor: ProcessorMixin, num_images: list[int], num_processes: int) -> bool:
    """Whether some batches of these samples may have an image and others none, at the same time."""
    runs_without = getattr(processor, "model_sees_dummy_images", False)
    return num_processes > 1 and takes_images(processor) and not runs_without and 0 in num_images and any(num_images)


def with_dummy_image(processor: ProcessorMixin, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of text, padded on the right, with an image behind the row that has fewest tokens."""
    lengths = batch["attention_mask"].sum(1)
    row = int(lengths.argmin())
    texts = [processor.image_token if i == row else "x" for i in range(len(lengths))]
    made, _ = processed(processor, texts, [[blank_image(SIZE)] if i == row else [] for i in range(len(lengths))])
    image = forward_arguments(processor, made)
    num_added = int(image["attention_mask"][row].sum())
    begin, end = int(lengths[row]), int(lengths[row]) + num_added
    width = max(batch["input_ids"].shape[1], end)
    of_tokens = {*per_token(batch), *per_token(image)}
    fills = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    placed = {name: value for name, value in (batch | image).items() if name not in of_tokens}
    for name in of_tokens:
        like = batch.get(name, image.get(name))
        placed[name] = torch.full((len(lengths), width, *like.shape[2:]), fills.get(name, 0), dtype=like.dtype)
        if name in batch:
            placed[name][:, : batch[name].shape[1]] = batch[name]
        if name in image:
            placed[name][row, begin:end] = image[name][row, :num_added]
    set_token_types(processor, placed)
    return placed
