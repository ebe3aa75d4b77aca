"""How long each sample is, in tokens, and how many of them are learned: told without opening an image."""

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import ProcessorMixin

from chat.encoding import count_tokens
from chat.expansion import rendered
from chat.image_text import has_fixed_images, identity, takes_images
from chat.images import shrunk_size
from chat.messages import messages_for
from chat.render import TEMPLATE_ERRORS, Messages
from data.cache import naming_the_cache, num_processes
from data.dataset import ConversationDataset
from data.sizes import IMAGE_SIZES, with_image_sizes
from utils import UserError, brief_error


# Of the cached counts. Raise it when chat/ or a processor of ours changes them.
LENGTHS_VERSION = 2
RECORDS_PER_PROCESS = 20_000  # some ten seconds of tokenizing: fewer are not worth another process


def measure_lengths(
    records: datasets.Dataset, processor: ProcessorMixin, max_length: int, max_image_pixels: int = 0
) -> datasets.Dataset:
    """Add `num_tokens` (before truncation) and `num_label_tokens` (after it) to every record.

    A record has 0 label tokens if truncation would cut one of its images or leaves nothing of its replies. The counts
    are cached, without the conversations. The cache's key covers all that they depend on, the code by LENGTHS_VERSION.

    Args:
        records: with the sizes of their images where the processor's tokens depend on them (`with_image_sizes`).
    """
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    dependencies = (tokenizer, processor.tokenizer.special_tokens_map, processor.chat_template, identity(processor))
    settings = (max_length, max_image_pixels, LENGTHS_VERSION)
    with naming_the_cache():
        lengths = records.map(
            lambda batch: count_batch(batch, processor, max_length, max_image_pixels),
            batched=True,
            batch_size=256,  # a thousand long conversations would hold a hundred megabytes of offsets
            num_proc=num_processes(len(records), RECORDS_PER_PROCESS),
            remove_columns=records.column_names,  # else the cache would hold the conversations once more
            new_fingerprint=Hasher.hash((records._fingerprint, *dependencies, *settings)),
            desc="Measuring lengths",
        )
    return datasets.concatenate_datasets([records, lengths], axis=1)


def count_batch(
    batch: dict[str, list], processor: ProcessorMixin, max_length: int, max_image_pixels: int
) -> dict[str, np.ndarray]:
    """`count_tokens` of some records. Raises UserError for the first that the model cannot take."""
    if not takes_images(processor):
        check_has_no_images(batch)
    conversations = [
        messages_of(processor, *record) for record in zip(batch["id"], batch["conversations"], strict=True)
    ]
    sizes = None
    if IMAGE_SIZES in batch:
        sizes = [[shrunk_size(tuple(size), max_image_pixels) for size in row] for row in batch[IMAGE_SIZES]]
    try:
        num_tokens, num_label_tokens = count_tokens(processor, conversations, sizes, max_length)
    except TEMPLATE_ERRORS:
        for record_id, messages in zip(batch["id"], conversations, strict=True):
            check_countable(processor, record_id, messages)
        raise
    return {"num_tokens": num_tokens, "num_label_tokens": num_label_tokens}


def messages_of(processor: ProcessorMixin, record_id: str, conversation: list[dict[str, str]]) -> Messages:
    """A record's messages. Raises UserError, naming it, if the model does not know one of its turns."""
    try:
        return messages_for(processor, conversation)
    except ValueError as error:
        raise UserError(f"record {record_id}: {error}") from None


def check_has_no_images(batch: dict[str, list]) -> None:
    for record_id, images in zip(batch["id"], batch["images"], strict=True):
        if images:
            raise UserError(
                f"record {record_id}: it has an image, and the model reads text only; take a vision-language model, "
                "or leave the record out"
            )


def check_countable(processor: ProcessorMixin, record_id: str, messages: Messages) -> None:
    """Raise UserError, naming the record, if the model's template or processor cannot take its conversation."""
    try:
        ((text,), _) = rendered(processor, [messages])
    except TEMPLATE_ERRORS as error:
        has_system = messages[0]["role"] == "system"
        remedy = "; move the system turn's text into the first human turn" if has_system else ""
        reason = f"the model's chat template fails: {brief_error(error)}{remedy}"
        raise UserError(f"record {record_id}: {reason}") from None
    token = getattr(processor, "image_token", None)
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    if token is not None and (found := text.count(token)) != num_images:
        raise UserError(
            f"record {record_id}: {num_images} images, but {found} times {token}, by which the model knows one: take "
            "it out of the text"
        )


def column_values(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array, without a Python object for each."""
    return dataset.select_columns(name).with_format("numpy")[:][name]


def count_cut(records: datasets.Dataset, max_length: int) -> int:
    """How many measured records lose the end of their replies at `max_length` tokens, and an end of turn with it."""
    num_tokens, num_label_tokens = (column_values(records, name) for name in ("num_tokens", "num_label_tokens"))
    return int(np.sum((num_tokens > max_length) & (num_label_tokens > 0)))


def with_lengths(
    dataset: ConversationDataset, processor: ProcessorMixin, max_length: int, max_image_pixels: int = 0
) -> datasets.Dataset:
    """The data set's records with their lengths, and with their images' sizes where the lengths depend on them.

    Raises:
        UserError: an image's size cannot be read, or the model cannot take a conversation.
    """
    records = dataset.records if has_fixed_images(processor) else with_image_sizes(dataset)
    return measure_lengths(records, processor, max_length, max_image_pixels)
