"""The label mask against the rule in words, token by token, and against the loss that transformers computes."""

import random

import pytest
import torch
from tokenizers import Encoding

from chat.label_mask import CutImage, count_fitting_tokens, find_label_tokens
from layers.chunked_loss import IGNORE_INDEX, find_label_positions
from models.loading import load_processor


IMAGE = 9


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    """Byte-level tokens: an emoji's four all start at the same character."""
    text = "".join(random.Random(0).choices("ab \n🙂é数<>", k=200))
    return load_processor("data/tiny_mgm").tokenizer(text).encodings[0]


@pytest.mark.parametrize("num_kept", [1, 2, 30, 90, None])
def test_label_tokens(encoding: Encoding, num_kept: int | None) -> None:
    """Every token is looked at: it starts inside a reply, is not cut off, no padding, and not the first after it."""
    num_kept = num_kept or len(encoding)
    for replies in ([], [(0, 200)], [(0, 1), (7, 7), (9, 61), (61, 64), (150, 200)]):
        for first in (0, 5):
            expected = [
                index
                for index, (start, _) in enumerate(encoding.offsets[:num_kept])
                if index > first and any(begin <= start < end for begin, end in replies)
            ]
            assert find_label_tokens(encoding, replies, first, num_kept) == expected
            assert expected or num_kept < 8 or not replies, "else nothing is tested"


@pytest.mark.parametrize("max_length", [None, *range(1, 14)])
def test_fitting_tokens(max_length: int | None) -> None:
    """Images of three positions and of four, shorter than they will be: what is left of the expanded row, or which
    image's positions do not all fit."""
    short, images = [1, IMAGE, 2, IMAGE, IMAGE, 3, 4], [(1, 2, 2), (3, 5, 2)]
    expanded = [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, IMAGE, 3, 4]
    if max_length is not None and max_length < 9:
        place = "1 to 3" if max_length < 4 else "5 to 8"
        with pytest.raises(CutImage, match=f"max_length {max_length} would cut into the image at positions {place}"):
            count_fitting_tokens(len(short), images, max_length)
    else:
        num_kept = count_fitting_tokens(len(short), images, max_length)
        assert num_kept + 4 == len(expanded[:max_length])


def test_label_positions() -> None:
    """Row by row, without a row's first; as many as transformers' shifted loss takes the mean over."""
    labels = torch.full((2, 4), IGNORE_INDEX)
    labels[0, 2], labels[1, 0], labels[1, 3] = 5, 6, 7
    assert find_label_positions(labels).tolist() == [2, 7]
    assert labels[1, 0] == 6, "the caller's labels are left alone"
    assert (labels[:, 1:] != IGNORE_INDEX).sum() == 2
