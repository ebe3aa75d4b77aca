"""A few samples looked at before training: what is learned of them, and whether their lengths were counted right."""

import numpy as np
from transformers import ProcessorMixin

from chat.encoding import encode, learned_tokens
from chat.images import shrink
from chat.messages import messages_for
from data.dataset import ConversationDataset
from data.lengths import column_values
from data.sizes import IMAGE_SIZES
from data.turn_ends import its_end
from utils import UserError, brief_error


def learned_text(processor: ProcessorMixin, dataset: ConversationDataset) -> list[str]:
    """For the first sample and the last: what the model learns of its replies, end of turn included."""
    lines = []
    for index in sorted({0, len(dataset) - 1}):
        record = dataset.records[index]
        replies = learned_tokens(processor, messages_for(processor, record["conversations"]))
        texts = [its_end(processor.tokenizer.decode(reply)) for reply in replies]
        more = {1: "", 2: " and 1 more reply"}.get(len(texts), f" and {len(texts) - 1} more replies")
        lines.append(f"Learned of record {record['id']}: {texts[0]!r}{more}")
    return lines


def check_lengths(processor: ProcessorMixin, dataset: ConversationDataset, max_image_pixels: int = 0) -> None:
    """Compare the counted tokens of samples with images of different sizes with what the processor makes of them.

    Raises:
        UserError: they differ, or an image cannot be opened and bad samples are not skipped.
    """
    for index in samples_to_check(dataset):
        record = dataset.records[index]
        try:
            images = dataset.open_images(record)
        except UserError:
            if dataset.skips_bad:
                continue
            raise
        images = [shrink(image, max_image_pixels) for image in images]
        try:
            made = encode(processor, [messages_for(processor, record["conversations"])], [images])
        except Exception as error:  # a processor may be anyone's
            reason = f"{type(processor).__name__} fails on its {len(images)} images"
            raise UserError(f"record {record['id']}: {reason} ({brief_error(error)})") from error
        num_tokens = made["input_ids"].shape[1]
        if num_tokens != record["num_tokens"]:
            raise UserError(
                f"record {record['id']}: the processor ({type(processor).__name__}) makes {num_tokens} tokens of it, "
                f"but {record['num_tokens']} were counted from the sizes of its images "
                f"({', '.join('{} x {}'.format(*image.size) for image in images)}): this model cannot be trained on "
                "such images here"
            )


def samples_to_check(dataset: ConversationDataset) -> list[int]:
    """The longest sample with an image, the one with most images, and those with the smallest, the largest, the widest
    and the tallest image."""
    records = dataset.records
    num_images = np.array([len(names) for names in records["images"]])
    with_images = np.flatnonzero(num_images)
    if len(with_images) == 0:
        return []
    lengths = column_values(records, "num_tokens")[with_images]
    chosen = {with_images[lengths.argmax()], num_images.argmax()}
    if IMAGE_SIZES in records.column_names:
        where = np.repeat(np.arange(len(records)), num_images)
        sizes = np.array([size for row in records[IMAGE_SIZES] for size in row])
        pixels, ratios = sizes.prod(1), sizes[:, 0] / sizes[:, 1]
        chosen |= {where[index] for index in (pixels.argmin(), pixels.argmax(), ratios.argmin(), ratios.argmax())}
    return sorted(map(int, chosen))
