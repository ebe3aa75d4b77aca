"""What a processor writes for an image, told from the image's size alone: how many tokens, and how they begin and end.

A data set's lengths are counted without opening an image. From an image's first special token to its last, the tokens
are the same whatever stands beside it. Before and after these may be text, as Gemma 3's newlines, which a tokenizer
joins with its neighbours': that part is kept, and tokenized with them.
"""

import hashlib
import weakref
from dataclasses import dataclass, field

from tokenizers import AddedToken
from transformers import ProcessorMixin

from chat.expansion import Expansion, first_token, move, processed
from chat.images import Size, blank_image
from chat.render import Span
from utils import UserError, brief_error


# Small, wide, large and tall. The first two differ most: where any two differ in their tokens, they do.
SIZES = ((40, 40), (1200, 200), (640, 480), (200, 1200))
BESIDE = "\nx\n"  # stands around an image in a trial


@dataclass(frozen=True)
class ImageText:
    """`edges` is what remains of an image's text when what lies between its first and last special token is taken out,
    and the last too if it is the first once more."""

    edges: str
    num_inside: int  # tokens taken out
    num_tokens: int  # in all, where nothing beside it joins them


@dataclass
class ImageRule:
    """What a processor makes of texts and images.

    `fixed`: the same of all images. Else each has the tokens that the processor counts for its size and `num_marks`
    more, or, if that is None, as many as a trial with an image of its size shows. `several`: the rule for rows of more
    than one image, if that is another (LLaVA-OneVision's).
    """

    first: str = ""  # a token that a row with images gets once, unless it begins with it
    first_of_text: str = ""  # the same for a row without
    fixed: ImageText | None = None
    num_marks: int | None = None
    several: "ImageRule | None" = None
    num_shared: int = 0  # tokens that an image right after another one has in common with it
    before_word: str = ""  # what the processor puts between an image and a word right after it (Idefics 2)
    known: dict[Size, ImageText] = field(default_factory=dict)


@dataclass(frozen=True)
class ShortText:
    """A rendered conversation with its images' `edges` in their place."""

    text: str
    replies: list[Span]
    images: list[tuple[int, int, int]]  # the characters of each image, [begin, end), and its `num_inside`


_identities: weakref.WeakKeyDictionary[ProcessorMixin, str] = weakref.WeakKeyDictionary()
_rules: dict[str, ImageRule] = {}


def image_text(processor: ProcessorMixin, size: Size | None, num_images: int = 1) -> ImageText:
    """The text of an image of this size. None: of any size, where `has_fixed_images`.

    Args:
        num_images: in its row.
    """
    rule = rule_of(processor)
    is_other = num_images > 1 and rule.several is not None
    rule = rule.several if is_other else rule
    if rule.fixed is not None:
        return rule.fixed
    if size not in rule.known:
        rule.known[size] = _by_count(processor, rule, size) or trial(processor, size, 1 + is_other)
    return rule.known[size]


def has_fixed_images(processor: ProcessorMixin) -> bool:
    """Whether an image takes as many tokens whatever its size, or the model takes none."""
    if not takes_images(processor):
        return True
    rule = rule_of(processor)
    return rule.fixed is not None and (rule.several is None or rule.several.fixed is not None)


def takes_images(processor: ProcessorMixin) -> bool:
    return getattr(processor, "image_token", None) is not None


def shortened(processor: ProcessorMixin, text: str, replies: list[Span], sizes: list[Size] | None) -> ShortText:
    """A rendered conversation as the processor would expand it, but for the insides of its images."""
    rule = rule_of(processor)
    token = getattr(processor, "image_token", None)
    segments = text.split(token) if token else [text]
    num_images = len(segments) - 1
    first = rule.first if num_images else rule.first_of_text
    short = "" if text.startswith(first) else first
    if num_images == 0:
        return ShortText(short + text, [(begin + len(short), end + len(short)) for begin, end in replies], [])
    sizes = sizes if sizes is not None else [None] * num_images
    if len(sizes) != num_images:
        raise ValueError(f"there are {num_images} {token} placeholders but {len(sizes)} images")
    images: list[tuple[int, int, int]] = []
    spans, shifts, position = [], [], 0
    for segment, size in zip(segments, [*sizes, None], strict=True):
        spans.append((position, position + len(segment)))
        shifts.append(len(short) - position)
        position += len(segment) + len(token)
        short += segment
        if len(images) < num_images:
            image = image_text(processor, size, num_images)
            num_inside = image.num_inside - (rule.num_shared if images and not segment else 0)
            images.append((len(short), len(short) + len(image.edges), num_inside))
            short += image.edges
            short += rule.before_word if begins_with_word(segments[len(images)]) else ""
    return ShortText(short, move(replies, spans, shifts), images)


def begins_with_word(text: str) -> bool:
    return text[:1].strip() not in ("", "<")  # a special token begins with the latter


def rule_of(processor: ProcessorMixin) -> ImageRule:
    """The processor's rule, found by trials. Raises UserError if the processor fails at them."""
    key = identity(processor)
    if key not in _rules:
        try:
            _rules[key] = _find_rule(processor)
        except Exception as error:  # it may be anyone's
            what = f"{type(processor).__name__} cannot be used: given an image and some text, it fails"
            raise UserError(f"{what} ({brief_error(error)})") from error
    return _rules[key]


def identity(processor: ProcessorMixin) -> str:
    """Names all of a processor's settings that decide what it writes for images: of a copy, too."""
    if processor not in _identities:
        tokens = sorted((token_id, str(token)) for token_id, token in processor.tokenizer.added_tokens_decoder.items())
        first = first_token(processor.tokenizer)
        settings = f"{type(processor).__qualname__} {processor.to_json_string()} {tokens} {first}"
        _identities[processor] = hashlib.sha256(settings.encode()).hexdigest()
    return _identities[processor]


def _find_rule(processor: ProcessorMixin) -> ImageRule:
    bos = processor.tokenizer.bos_token
    first_of_text = expanded_trial(processor, None, 0).text.removesuffix(BESIDE)
    if not takes_images(processor):
        return ImageRule(first_of_text=first_of_text)
    rule = _rule_for(processor, 1)
    rule.first_of_text = first_of_text
    size = next(iter(rule.known))
    single, pair, adjacent, word = (
        expanded_trial(processor, size, num_images, **beside)
        for num_images, beside in ((1, {}), (2, {}), (2, {"between": ""}), (1, {"after": BESIDE.strip()}))
    )
    rule.first = bos if bos and bos in single.text else ""
    if written(processor, pair) != written(processor, single):
        rule.several = _rule_for(processor, 2)
    rule.before_word = written(processor, word).removeprefix(written(processor, single))
    rule.num_shared = num_tokens(processor, pair) - num_tokens(processor, BESIDE) - num_tokens(processor, adjacent)
    return rule


def _rule_for(processor: ProcessorMixin, num_images: int) -> ImageRule:
    """The rule for rows of so many images."""
    counts = [counted(processor, size) for size in SIZES]
    looks_fixed = counts[0] is not None and len(set(counts)) == 1
    found = {size: trial(processor, size, num_images) for size in (SIZES[:2] if looks_fixed else SIZES)}
    rule = ImageRule(known=found)
    if len(set(found.values())) == 1:
        rule.fixed = found[SIZES[0]]
    elif counts[0] is not None and not looks_fixed:
        marks = {found[size].num_tokens - count for size, count in zip(SIZES, counts, strict=True)}
        if len(marks) == 1 and len({image.edges for image in found.values()}) == 1:
            rule.num_marks = marks.pop()
    return rule


def num_tokens(processor: ProcessorMixin, text: str | Expansion) -> int:
    text = text if isinstance(text, str) else text.text
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def counted(processor: ProcessorMixin, size: Size) -> int | None:
    """The tokens of an image as the processor itself counts them, some without their marks. None: it cannot."""
    width, height = size
    try:
        return int(processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0])
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _by_count(processor: ProcessorMixin, rule: ImageRule, size: Size) -> ImageText | None:
    if rule.num_marks is None:
        return None
    like = next(iter(rule.known.values()))
    num_tokens = counted(processor, size) + rule.num_marks
    return ImageText(like.edges, num_tokens - (like.num_tokens - like.num_inside), num_tokens)


def trial(processor: ProcessorMixin, size: Size, num_images: int = 1) -> ImageText:
    """What the processor writes for a blank image of this size in a row of so many."""
    text = written(processor, expanded_trial(processor, size, num_images))
    encoding = processor.tokenizer(text, add_special_tokens=False).encodings[0]
    added = processor.tokenizer.added_tokens_decoder
    marks = [i for i, token_id in enumerate(encoding.ids) if token_id in added and is_mark(added[token_id])]
    edges, num_inside = text, 0
    if len(marks) > 1:
        is_same = encoding.ids[marks[0]] == encoding.ids[marks[-1]]
        start, stop = encoding.token_to_chars(marks[0])[1], encoding.token_to_chars(marks[-1])[1 if is_same else 0]
        edges, num_inside = text[:start] + text[stop:], marks[-1] - marks[0] - (not is_same)
    return ImageText(edges, num_inside, len(encoding))


def written(processor: ProcessorMixin, expansion: Expansion) -> str:
    """What stands for the first image of a trial, without the <bos> that PaliGemma puts after a row's last."""
    begin, end = expansion.images[0]
    return expansion.text[begin:end].replace(processor.tokenizer.bos_token or "\0", "")


def is_mark(token: AddedToken) -> bool:
    """Whether the token splits every text that it is in: some vocabularies have runs of newlines as added tokens."""
    return token.content == token.content.strip()


def expanded_trial(
    processor: ProcessorMixin, size: Size | None, num_images: int, between: str = BESIDE, after: str = BESIDE
) -> Expansion:
    """A text with so many blank images in it as the processor hands it to its tokenizer."""
    images = [processor.image_token] * num_images if num_images else []
    text = BESIDE + between.join(images) + (after if images else "")
    (expansion,) = processed(processor, [text], [[blank_image(size) for _ in images]])[1].expansions
    return expansion
