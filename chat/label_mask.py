"""The label mask: which tokens of a sample carry a label and so enter the loss. The rule stands here alone.

A token carries a label if it starts inside a reply, is not cut off, and is not the first of its sample: no token comes
before that one to predict it. `chat/render.py` finds the replies. What makes batches and what counts label tokens both
call `count_fitting_tokens` and `find_label_tokens`.
"""

from bisect import bisect_left

from tokenizers import Encoding

from chat.render import Span
from layers.chunked_loss import FIRST_LABEL


class CutImage(ValueError):
    """`max_length` would cut an image in two."""


def count_fitting_tokens(num_tokens: int, images: list[tuple[int, int, int]], max_length: int | None) -> int:
    """How many of a sample's tokens fit into `max_length` positions.

    Args:
        num_tokens: of the sample, in which an image may be shorter than it will be.
        images: of each image where it begins and ends among these tokens, and how many more positions it will take.

    Raises:
        CutImage: an image does not fit.
    """
    num_added = sum(added for _, _, added in images)
    if max_length is None or num_tokens + num_added <= max_length:
        return num_tokens
    num_before = 0  # positions that the images before add
    for begin, end, added in images:
        start, stop = begin + num_before, end + num_before + added
        if stop > max_length:
            raise CutImage(
                f"max_length {max_length} would cut into the image at positions {start} to {stop - 1}: "
                "leave the sample out or raise max_length"
            )
        num_before += added
    return max_length - num_added


def find_label_tokens(encoding: Encoding, replies: list[Span], first: int, num_kept: int) -> list[int]:
    """The indices of the tokens that carry a label.

    A reply's leading newline carries none where the tokenizer joins it with the newline before it: that token starts
    before the reply. The original MGM masks it too, and generation need not produce it: the prompt ends with one.

    Args:
        encoding: the rendered conversation.
        replies: the characters of each reply, [begin, end).
        first: the sample's first token; what stands before it is padding.
        num_kept: tokens from this index on are cut off, or padding.
    """
    kept = range(first + FIRST_LABEL, max(num_kept, first + FIRST_LABEL))
    return [index for begin, end in replies for index in tokens_of(encoding, begin, end, kept)]


def tokens_of(encoding: Encoding, begin: int, end: int, within: range) -> range:
    """The tokens among `within` that start in the characters [begin, end).

    Looking up a token's characters is slow, so the search is binary.
    """

    def first_token(character: int) -> int:
        return bisect_left(within, character, key=lambda index: encoding.token_to_chars(index)[0])

    return within[first_token(begin) : first_token(end)]
