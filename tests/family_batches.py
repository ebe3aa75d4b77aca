"""Batches for tiny models of any family, by the family's own processor: texts of random letters, images of noise."""

import string

import numpy as np
import torch
from PIL import Image
from tiny_families import TOKEN_IDS
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from layers.chunked_loss import IGNORE_INDEX


Sample = tuple[int, list[tuple[int, int]]]  # letters, and each image's width and height


def make_batch(
    processor: ProcessorMixin, samples: list[Sample], padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Forward's arguments and labels: every letter behind a row's last image has one."""
    rng = np.random.default_rng(0)
    texts, images = [], []
    for num_letters, sizes in samples:
        letters = "".join(rng.choice(list(string.ascii_letters), num_letters))
        pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": letters}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": letters[::-1]}]
        (text,), _ = render_jinja_template(
            [messages], chat_template=processor.chat_template, **processor.tokenizer.special_tokens_map
        )
        texts.append(text)
        images.append(pictures)
    processor.tokenizer.padding_side = padding_side
    pictures = {"images": images} if any(images) else {}
    batch = processor(text=texts, padding=True, return_tensors="pt", **pictures)
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= min(TOKEN_IDS.values()), IGNORE_INDEX)
    return batch
