"""Conversations and images by every family's own processor: labels, lengths, padding, cuts, prompts."""

from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, TEXT_FAMILIES, TORCHVISION_FAMILIES, VISION_FAMILIES, write_family
from tokenizers.processors import TemplateProcessing
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available

import chat.image_text
from chat.arguments import per_token
from chat.encoding import count_tokens, encode, learned_tokens, num_image_tokens
from chat.image_text import has_fixed_images
from chat.images import Size
from chat.label_mask import CutImage
from chat.render import Messages
from layers.chunked_loss import IGNORE_INDEX
from models.loading import load_processor
from utils import UserError


MISSING = set() if is_torchvision_available() else set(TORCHVISION_FAMILIES)
VISION = [name for name in VISION_FAMILIES if name not in MISSING]
TEXT = ["llama", "gpt2", "mamba2"]
SIZES: list[Size] = [(100, 80), (60, 150), (33, 70), (300, 50), (224, 224), (57, 513), (640, 480), (29, 28)]
END = {"paligemma": "</s>", "paligemma2": "</s>"}  # of a turn; <|im_end|> in the others


@cache
def processor_of(name: str) -> ProcessorMixin:
    folder = Path(mkdtemp())
    write_family(name, folder)
    return load_processor(str(folder))


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def conversation(
    num_images: int, question: str = "What?", replies: tuple[str, ...] = ("A cat.", "Yes\n\nindeed. ")
) -> Messages:
    """Images first, between texts, and side by side; then a second question."""
    parts = {
        0: [],
        1: [IMAGE],
        2: [IMAGE, text("\nand\n"), IMAGE],
        3: [text("These: "), IMAGE, IMAGE, text(" "), IMAGE],
    }
    messages = []
    for i, reply in enumerate(replies):
        content = [*parts[num_images], text(question)] if i == 0 else [text("\nSure?")]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [text(reply)]}]
    return messages


def picture(size: Size) -> Image.Image:
    return Image.new("RGB", size, (9, 99, 199))


Case = tuple[list[Messages], list[list[Size]]]


def cases() -> Case:
    """Rows of one, two, three and no images, of all sizes."""
    sizes = [[size] for size in SIZES] + [SIZES[:2], SIZES[3:5], SIZES[1:4], [], SIZES[-1:] * 2]
    return [conversation(len(row)) for row in sizes], sizes


def encoded(processor: ProcessorMixin, rows: list[Messages], sizes: list[list[Size]], **options) -> BatchFeature:
    return encode(processor, rows, [[picture(size) for size in row] for row in sizes], **options)


def label_runs(labels: torch.Tensor) -> list[list[int]]:
    return [list(run) for is_label, run in groupby(labels.tolist(), lambda x: x != IGNORE_INDEX) if is_label]


@pytest.mark.parametrize("name", VISION + TEXT)
def test_labels_are_the_replies(name: str) -> None:
    """Of rows with images and without, decoded: the replies to a letter, each with its end of turn."""
    processor, end = processor_of(name), END.get(name, "<|im_end|>")
    rows, sizes = cases()
    if name in TEXT:
        rows, sizes = rows[-2:-1], sizes[-2:-1]
    for batch in (encoded(processor, rows, sizes), encoded(processor, [conversation(0)], [[]])):
        for labels in batch["labels"]:
            texts = [processor.tokenizer.decode(run) for run in label_runs(labels)]
            assert texts == ["A cat." + end, "Yes\n\nindeed. " + end]
    for row in rows:
        tokens = learned_tokens(processor, row)
        assert [processor.tokenizer.decode(run) for run in tokens] == ["A cat." + end, "Yes\n\nindeed. " + end]


@pytest.mark.parametrize("name", VISION + TEXT)
def test_counts_are_the_lengths(name: str) -> None:
    """By sizes alone, for many sizes and numbers of images: each row's tokens and labels, wherever it is cut."""
    processor = processor_of(name)
    rows, sizes = cases()
    if name in TEXT:
        rows, sizes = rows[-2:-1], sizes[-2:-1]
    batch = encoded(processor, rows, sizes)
    lengths = batch["attention_mask"].sum(1).tolist()
    num_tokens, num_labels = count_tokens(processor, rows, sizes)
    assert num_tokens.tolist() == lengths
    assert num_labels.tolist() == (batch["labels"] != IGNORE_INDEX).sum(1).tolist()
    if has_fixed_images(processor):
        assert count_tokens(processor, rows)[0].tolist() == lengths, "no size is asked for"
    for max_length in (20, 60, *(length - 3 for length in lengths[:2])):
        _, num_labels = count_tokens(processor, rows, sizes, max_length)
        for row, own, expected in zip(rows, sizes, num_labels, strict=True):
            try:
                cut = encoded(processor, [row], [own], max_length=max_length)
            except CutImage:
                assert expected == 0
                continue
            assert (cut["labels"] != IGNORE_INDEX).sum() == expected
            assert all(cut[name].shape[1] <= max_length for name in per_token(cut))


@pytest.mark.parametrize("name", VISION)
def test_padding_on_either_side(name: str) -> None:
    """Without its padding a row is the same; so is every image."""
    processor = processor_of(name)
    rows, sizes = cases()
    left, right = (encoded(processor, rows, sizes, padding_side=side) for side in ("left", "right"))
    assert left.keys() == right.keys() and left["attention_mask"][-2, 0] == 0 == right["attention_mask"][-2, -1]
    for key in right:
        if key in per_token(right):
            is_token = [batch["attention_mask"].bool() for batch in (left, right)]
            assert torch.equal(left[key][is_token[0]], right[key][is_token[1]]), key
        else:
            assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("name", VISION)
def test_rows_are_what_they_are_alone(name: str) -> None:
    """Beside rows of other lengths and numbers of images. The model's arguments are tensors."""
    processor = processor_of(name)
    rows, sizes = cases()
    batch = encoded(processor, rows, sizes)
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    for i in (0, 8, 10, 11):
        alone = encoded(processor, rows[i : i + 1], sizes[i : i + 1])
        is_token = batch["attention_mask"][i].bool()
        for key in set(per_token(alone)) - {"cross_attention_mask"}:  # as wide as the batch's most images
            assert torch.equal(batch[key][i][is_token], alone[key][0]), key


@pytest.mark.parametrize("name", VISION + TEXT)
def test_a_prompt_ends_where_the_reply_begins(name: str) -> None:
    """The generation prompt's tokens are those before the first label."""
    processor = processor_of(name)
    rows, sizes = cases()
    for row, own in [*zip(rows, sizes, strict=True)][-2 if name in TEXT else 0 : len(rows) - (name in TEXT)]:
        prompt = encoded(processor, [row[:1]], [own], add_generation_prompt=True)
        whole = encoded(processor, [row], [own])
        first = int((whole["labels"][0] != IGNORE_INDEX).nonzero()[0])
        assert prompt["input_ids"][0].tolist() == whole["input_ids"][0, :first].tolist()
        assert not (prompt["labels"] != IGNORE_INDEX).any()
        counted, _ = count_tokens(processor, [row[:1]], [own], add_generation_prompt=True)
        assert counted.tolist() == [first]


def test_tokens_of_an_image_of_each_kind() -> None:
    """Fixed, as many as the size asks for, in tiles with their marks; in a row of several LLaVA-OneVision's few."""
    assert {num_image_tokens(processor_of("llava"), size) for size in SIZES} == {16}
    assert num_image_tokens(processor_of("gemma3"), (100, 80)) == 16 + 2 + 4, "two marks, and newlines byte by byte"
    qwen = processor_of("qwen2_5_vl")
    assert num_image_tokens(qwen, (56, 56)) == 4 and num_image_tokens(qwen, (112, 56)) == 8
    onevision = processor_of("llava_onevision")
    assert num_image_tokens(onevision, (300, 50), 2) < num_image_tokens(onevision, (300, 50))
    smolvlm = processor_of("smolvlm")
    assert num_image_tokens(smolvlm, (640, 480)) == 34 and num_image_tokens(smolvlm, (300, 50)) == 21, "2 x 2, 1 x 2"


def with_bos(name: str, template_writes_it: bool) -> ProcessorMixin:
    """A processor whose tokenizer puts <s> before a text by itself."""
    folder = Path(mkdtemp())
    write_family(name, folder)
    processor = load_processor(str(folder))
    bos = processor.tokenizer.bos_token
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, processor.tokenizer.bos_token_id)]
    )
    if template_writes_it:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


@pytest.mark.parametrize("template_writes_it", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "mllama", "gemma3", "smolvlm"])
def test_one_bos(name: str, template_writes_it: bool) -> None:
    """Whether the template or the tokenizer adds it, and whether a row has images: the first token, once."""
    processor = with_bos(name, template_writes_it)
    rows, sizes = cases()
    batch = encoded(processor, rows, sizes)
    bos = processor.tokenizer.bos_token_id
    assert (batch["input_ids"][:, 0] == bos).all() and ((batch["input_ids"] == bos).sum(1) == 1).all()
    assert count_tokens(processor, rows, sizes)[0].tolist() == batch["attention_mask"].sum(1).tolist()
    texts = [processor.tokenizer.decode(run) for run in label_runs(batch["labels"][1])]
    assert texts == ["A cat.<|im_end|>", "Yes\n\nindeed. <|im_end|>"]


def test_newlines_that_the_tokenizer_joins() -> None:
    """Gemma 3 puts newlines around an image. A tokenizer that joins them with the text's counts fewer tokens."""
    processor = with_bos("gemma3", False)
    processor.tokenizer.add_tokens(["\n\n", "\n\n\n", "\n\n\n\n"])
    rows = [conversation(2, question) for question in ("\nWhat?", "What?", "\n\nWhat?")]
    sizes = [SIZES[:2]] * 3
    lengths = encoded(processor, rows, sizes)["attention_mask"].sum(1).tolist()
    assert count_tokens(processor, rows, sizes)[0].tolist() == lengths
    assert lengths[0] == lengths[1] == lengths[2], "three newlines and four are one token as two are"


def test_the_prefix_is_seen_from_both_sides() -> None:
    """PaliGemma's token_type_ids: 0 up to the reply, 1 from there on; of a prompt all 0."""
    processor = processor_of("paligemma")
    batch = encoded(processor, [conversation(1, replies=("A cat.",)), conversation(1)], [SIZES[:1]] * 2)
    for types, labels in zip(batch["token_type_ids"], batch["labels"], strict=True):
        first = int((labels != IGNORE_INDEX).nonzero()[0])
        assert not types[:first].any() and types[first:].all()
    prompt = encoded(processor, [conversation(1)[:1]], [SIZES[:1]], add_generation_prompt=True)
    assert not prompt["token_type_ids"].any()
    bos, newline = (processor.tokenizer(x)["input_ids"][0] for x in ("<s>", "\n"))
    tokens = batch["input_ids"][0].tolist()
    assert tokens[:17] == [processor.image_token_id] * 16 + [bos] and tokens[tokens.index(newline) + 1] != newline


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_bad_input(name: str) -> None:
    """More images than placeholders, and the model's own image token in a text."""
    processor = processor_of(name)
    with pytest.raises(ValueError, match="sample 1 has 1 .* placeholders but 2 images"):
        encoded(processor, [conversation(1)] * 2, [SIZES[:1], SIZES[:2]])
    row = conversation(1, f"What is {processor.image_token}?")
    with pytest.raises(ValueError, match="sample 0 has 2 .* placeholders but 1 images"):
        encoded(processor, [row], [SIZES[:1]])
    with pytest.raises(ValueError, match="there are 2 .* placeholders but 1 images"):
        count_tokens(processor, [row], [SIZES[:1]])
    with pytest.raises(ValueError, match="takes no images"):
        encoded(processor_of("llama"), [conversation(0)], [SIZES[:1]])


def test_every_family_is_tested() -> None:
    assert set(VISION) | set(TEXT_FAMILIES) | MISSING == set(FAMILIES) and len(VISION) >= 25


@pytest.mark.parametrize("problem", ["fails", "rewrites", "slow"])
def test_a_processor_that_cannot_be_used(problem: str, monkeypatch) -> None:
    """It raises, changes the text beside an image, or has no tokenizer that says where its tokens are: one line."""
    monkeypatch.setattr(chat.image_text, "_rules", {})
    processor = with_bos("llava", False)
    process = type(processor).__call__

    def changed(self: ProcessorMixin, text: list[str], **kwargs) -> BatchFeature:
        if problem == "fails":
            raise KeyError("pixels")
        return process(self, text=[each.replace("x", "y") for each in text], **kwargs)

    if problem == "slow":
        monkeypatch.setattr("transformers.BatchEncoding.encodings", None)
    else:
        monkeypatch.setattr(type(processor), "__call__", changed)
    expected = {"fails": "pixels", "rewrites": "rewrites the text", "slow": "calls no fast tokenizer"}[problem]
    with pytest.raises(UserError, match=f"LlavaProcessor cannot be used: .*{expected}") as error:
        has_fixed_images(processor)
    assert "\n" not in str(error.value)


def test_a_count_that_is_wrong() -> None:
    """Gemma 3 counts no crops. Where its images have some, trials with images tell."""
    processor = with_bos("gemma3", False)
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4}
    type(processor).images_kwargs, before = type(processor).images_kwargs | settings, type(processor).images_kwargs
    processor.image_processor.pan_and_scan_max_num_crops = 4  # another processor than those without
    try:
        rows, sizes = cases()
        lengths = encoded(processor, rows, sizes)["attention_mask"].sum(1).tolist()
        assert not has_fixed_images(processor)
        assert count_tokens(processor, rows, sizes)[0].tolist() == lengths
    finally:
        type(processor).images_kwargs = before
