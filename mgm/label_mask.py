"""The label mask: which tokens of a sample carry a label and so enter the loss. The rule stands here alone.

A token carries a label if it starts inside a reply, is not an image, is not cut off, and is not the first of its
sample: no token comes before that one to predict it. `chat_templates` finds the replies. The processor and the counter
of label tokens both call `count_fitting_tokens` and `find_label_tokens`.
"""

from bisect import bisect_left

from tokenizers import Encoding

from layers.chunked_loss import FIRST_LABEL
from mgm.chat_templates import Span


class CutImage(ValueError):
    """`max_length` would cut an image in two."""


def count_fitting_tokens(
    input_ids: list[int], image_token_id: int, num_image_tokens: int, max_length: int | None
) -> int:
    """How many tokens fit into `max_length` positions. In `input_ids` an image is still one token.

    Args:
        num_image_tokens: positions that an image takes.

    Raises:
        CutImage: an image does not fit.
    """
    num_added = input_ids.count(image_token_id) * (num_image_tokens - 1)  # positions that expanding the images adds
    if max_length is None or len(input_ids) + num_added <= max_length:
        return len(input_ids)
    images = [index for index, token_id in enumerate(input_ids) if token_id == image_token_id]
    for number, index in enumerate(images):
        start = index + number * (num_image_tokens - 1)
        if start + num_image_tokens > max_length:
            raise CutImage(
                f"max_length {max_length} would cut into the image at positions {start} to "
                f"{start + num_image_tokens - 1}: leave the sample out or raise max_length"
            )
    return max_length - num_added


def find_label_tokens(
    encoding: Encoding, input_ids: list[int], replies: list[Span], image_token_id: int, num_kept: int
) -> list[int]:
    """The indices of the tokens that carry a label.

    A reply's leading newline carries none where the tokenizer joins it with the newline before it: that token starts
    before the reply. The original masks it too, and generation need not produce it: the prompt ends with a newline.

    Args:
        encoding: the rendered conversation. An image is still one token.
        input_ids: `encoding.ids`, which builds a list at every access.
        replies: the characters of each reply, [begin, end).
        num_kept: tokens from this index on are cut off.
    """
    kept = range(FIRST_LABEL, num_kept)

    def first_token(character: int) -> int:
        """The first kept token that starts at `character` or after it. Looking up a token's characters is slow, so the
        search is binary."""
        return bisect_left(kept, character, key=lambda index: encoding.token_to_chars(index)[0])

    in_replies = [kept[first_token(begin) : first_token(end)] for begin, end in replies]
    return [index for indices in in_replies for index in indices if input_ids[index] != image_token_id]
