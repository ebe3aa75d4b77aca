"""The processor against the original's own pixels, ids and labels; what it refuses; transformers' message format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chat.messages import to_messages
from layers.chunked_loss import IGNORE_INDEX
from mgm.configuration_mgm import MGMConfig, tiny
from mgm.processing_mgm import MGMProcessor, build_processor, pad_to_square


ORIGINAL_IMAGE_TOKEN = -200  # one id an image in the original's input_ids; ours has one a position
QUESTION = [{"from": "human", "value": "<image>\nWhat is written on the sign?"}]
CONVERSATION = [*QUESTION, {"from": "gpt", "value": "The sign says STOP 42."}]
CHAT = [{"from": "human", "value": "Name three colors."}, {"from": "gpt", "value": "Red, green and blue."}]


@pytest.fixture(scope="module")
def original(reference_folder: Path) -> dict:
    """Conversations with the ids and labels that the original's code made of them."""
    return json.loads((reference_folder / "conversations.json").read_text())


@pytest.fixture
def image(reference_folder: Path) -> Image.Image:
    return Image.open(reference_folder / "images/wide.png")


def expand(original_ids: list[int], values: list[int], image_value: int) -> list[int]:
    """The original's row with its one position an image repeated 16 times."""
    rows = [
        [image_value] * 16 if token_id == ORIGINAL_IMAGE_TOKEN else [value]
        for token_id, value in zip(original_ids, values, strict=True)
    ]
    return sum(rows, [])


@pytest.mark.parametrize("case", ["tiny_pad.wide", "tiny_pad.tall", "tiny_pad.bigwide", "tiny_square.wide"])
def test_pixels_are_the_originals(processor, reference_folder, case):
    """Both views of an image with the original's: the high one bit for bit, for each number is made by itself; the low
    one within rounding, for other CPUs add up the four numbers in other ways (fused or not)."""
    expected = load_file(reference_folder / "preprocess.safetensors")
    aspect_ratio, name = case.removeprefix("tiny_").split(".")
    low, high = processor.image_views(Image.open(reference_folder / f"images/{name}.png"), aspect_ratio)
    torch.testing.assert_close(low, expected[f"{case}.image"], rtol=1e-6, atol=1e-6)
    assert torch.equal(high, expected[f"{case}.image_aux"])


def test_high_view_is_the_image_processors(processor):
    """Bit for bit what transformers makes of it, with every byte in every channel."""
    size = processor.image_processor.crop_size["height"]
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels.reshape(-1, 3)[:256] = np.arange(256)[:, None]
    image = Image.fromarray(pixels)
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(processor.image_views(image)[1], expected)


def test_pad_to_square_is_the_originals(processor, reference_folder, image):
    """The padded image, before any resizing, with the original's expand2square."""
    expected = load_file(reference_folder / "preprocess.safetensors")["expand2square.wide"]
    square = pad_to_square(image, tuple(int(x * 255) for x in processor.image_processor.image_mean))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(square.height, square.width, 3)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("index", range(3))
def test_ids_and_labels_are_the_originals(processor, original, index):
    """One image, two turns about an image, text only: every id and every label."""
    sample = original["samples"][index]
    ids = sample["input_ids"]
    input_ids, labels = processor.tokenize(sample["conversations"])
    assert input_ids == expand(ids, ids, processor.image_token_id)
    assert labels == expand(ids, sample["labels"], IGNORE_INDEX)
    assert any(label != IGNORE_INDEX for label in labels)


@pytest.mark.parametrize("index", range(2))
def test_inference_prompts_are_the_originals(processor, original, index):
    """A question alone, ending in the header of the model's turn."""
    prompt = original["inference_prompts"][index]
    question = ("<image>\n" if prompt["has_image"] else "") + prompt["question"]
    input_ids, labels = processor.tokenize([{"from": "human", "value": question}], add_generation_prompt=True)
    assert input_ids == expand(prompt["input_ids"], prompt["input_ids"], processor.image_token_id)
    assert set(labels) == {IGNORE_INDEX}


def test_a_padded_batch_is_the_originals(processor, original, image):
    """Three conversations of different length with what the original's collator made of them."""
    conversations = [sample["conversations"] for sample in original["samples"]]
    batch = processor(conversations=conversations, images=[[image], [image], []])
    rows = original["collated_first_three"]
    for row, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        expected_ids = expand(ids, ids, processor.image_token_id)
        expected_labels = expand(ids, labels, IGNORE_INDEX)
        # The original expands an image inside the model and pads again there: lengths differ by padding alone.
        length = min(len(expected_ids), batch["input_ids"].shape[1])
        assert batch["input_ids"][row, :length].tolist() == expected_ids[:length]
        assert batch["labels"][row, :length].tolist() == expected_labels[:length]
        assert set(batch["input_ids"][row, length:].tolist() + expected_ids[length:]) <= {0}
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    assert batch["pixel_values_aux"].shape == (2, 3, 128, 128)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_side(processor, image, padding_side):
    """A padded row with the same row alone, and its mask and labels at the padding."""
    batch = processor(conversations=[CONVERSATION, CHAT], images=[[image], []], padding_side=padding_side)
    input_ids, labels = processor.tokenize(CHAT)
    pad = batch["input_ids"].shape[1] - len(input_ids)
    assert pad > 0
    kept, filling = (slice(pad, None), slice(pad)) if padding_side == "left" else (slice(-pad), slice(-pad, None))
    assert batch["input_ids"][1, kept].tolist() == input_ids
    assert batch["labels"][1, kept].tolist() == labels
    assert batch["attention_mask"][1, kept].all() and not batch["attention_mask"][1, filling].any()
    assert set(batch["input_ids"][1, filling].tolist()) == {processor.tokenizer.pad_token_id}
    assert set(batch["labels"][1, filling].tolist()) == {IGNORE_INDEX}
    assert batch["attention_mask"][0].all()


def test_text_only_batch_has_no_pixels(processor):
    """What forward is to be told apart by: no image, no key."""
    assert set(processor(conversations=[CHAT])) == {"input_ids", "attention_mask", "labels"}


def test_truncation_cuts_text_to_exactly_max_length(processor, image):
    """Every length from the image's end to the whole with the head of the untruncated row."""
    input_ids, labels = processor.tokenize(CONVERSATION)
    end_of_image = len(input_ids) - input_ids[::-1].index(processor.image_token_id)
    for max_length in range(end_of_image, len(input_ids) + 2):
        batch = processor(conversations=[CONVERSATION], images=[image], max_length=max_length)
        assert batch["input_ids"][0].tolist() == input_ids[:max_length]
        assert batch["labels"][0].tolist() == labels[:max_length]


def test_truncation_never_cuts_an_image(processor):
    """Every length that ends inside or before the image is refused, with the positions it would cut."""
    input_ids, _ = processor.tokenize(CONVERSATION)
    start = input_ids.index(processor.image_token_id)
    for max_length in (1, start, start + 1, start + 15):
        with pytest.raises(ValueError, match=f"max_length {max_length} would cut into the image at positions {start}"):
            processor.tokenize(CONVERSATION, max_length)


@pytest.mark.parametrize(
    ("conversation", "num_images", "message"),
    [
        (CONVERSATION, 0, "sample 0 has 1 <image> placeholders but 0 images"),
        (CONVERSATION, 2, "sample 0 has 1 <image> placeholders but 2 images"),
        (CHAT, 1, "sample 0 has 0 <image> placeholders but 1 images"),
    ],
)
def test_placeholders_and_images_must_match(processor, image, conversation, num_images, message):
    """The error names the sample and both counts."""
    with pytest.raises(ValueError, match=message):
        processor(conversations=[conversation], images=[[image] * num_images])


def test_images_for_another_number_of_samples(processor, image):
    """A list of images too many is an error, not a silent zip."""
    with pytest.raises(ValueError, match="images are given for 2 samples but there are 1"):
        processor(conversations=[CONVERSATION], images=[[image], [image]])


def test_text_or_conversations(processor):
    """Neither and both are errors."""
    with pytest.raises(ValueError, match="exactly one of text and conversations"):
        processor()
    with pytest.raises(ValueError, match="exactly one of text and conversations"):
        processor(text="a", conversations=[CHAT])


def test_images_keep_their_order(processor, reference_folder):
    """Views of a batch with two images in one sample with the views of each image alone."""
    images = [Image.open(reference_folder / f"images/{name}.png") for name in ("wide", "tall")]
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich is wider?"}, {"from": "gpt", "value": "The first."}]
    batch = processor(conversations=[turns, CONVERSATION], images=[images, [images[1]]])
    for i, image in enumerate([*images, images[1]]):
        low, high = processor.image_views(image)
        assert torch.equal(batch["pixel_values"][i], low)
        assert torch.equal(batch["pixel_values_aux"][i], high)


def test_apply_chat_template_gives_the_same_ids(processor, image):
    """transformers' message format with LLaVA's turns, ids and pixels."""
    text = {"type": "text", "text": "What is written on the sign?"}
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(conversations=[QUESTION], images=[image], add_generation_prompt=True)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["pixel_values_aux"], expected["pixel_values_aux"])


def test_chat_template_takes_plain_strings(processor):
    """Messages whose content is a string with LLaVA's turns."""
    messages = [
        {"role": "user", "content": "Name three colors."},
        {"role": "assistant", "content": "Red, green and blue."},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert processor(text=text)["input_ids"][0].tolist() == processor.tokenize(CHAT)[0]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "narrator", "value": "Once"}], "a turn is from 'narrator': expected one of human"),
        ([CHAT[0], CHAT[0]], "two turns in a row are from 'human'"),
        ([*CHAT, CHAT[1]], "two turns in a row are from 'gpt'"),
        ([CHAT[0], {"from": "gpt", "value": "See <image>"}], "a reply by 'gpt' contains <image>"),
    ],
)
def test_bad_turns(processor, turns, message):
    """What is not a LLaVA conversation is refused with the reason."""
    with pytest.raises(ValueError, match=message):
        processor.tokenize(turns)


def test_first_turn_by_the_model_is_dropped(processor):
    """A conversation that the model opens with the same one without its opening, as in the original."""
    assert processor.tokenize([{"from": "gpt", "value": "Hello!"}, *CHAT]) == processor.tokenize(CHAT)


def test_image_moves_to_the_front_of_its_message():
    """A placeholder at the end and in the middle with one at the front."""
    front = to_messages([{"from": "human", "value": "<image>\nWhat is it?"}], images_first=True)
    assert to_messages([{"from": "human", "value": "What is it?\n<image>"}], images_first=True) == front


@pytest.mark.parametrize("image_global", [False, True])
def test_crops_are_cut_from_the_scaled_high_view(processor, image, image_global):
    """HD: crops in reading order, of the high view at twice CLIP's size; the whole is that scaled down again."""
    hd = MGMProcessor(
        processor.image_processor, processor.tokenizer, image_size=56, image_grid=2, image_global=image_global
    )
    low, high = hd.image_views(image)
    assert torch.equal(high, processor.image_views(image)[1])
    scaled = torch.nn.functional.interpolate(high[None], size=(112, 112), mode="bilinear")
    expected = [scaled[0, :, top : top + 56, left : left + 56] for top in (0, 56) for left in (0, 56)]
    if image_global:
        expected.append(torch.nn.functional.interpolate(scaled, size=(56, 56), mode="bilinear")[0])
    assert torch.equal(low, torch.stack(expected))
    assert hd.num_image_tokens == 16 * len(expected)
    batch = hd(conversations=[CONVERSATION, CHAT], images=[[image], []])
    assert batch["pixel_values"].shape == (1, len(expected), 3, 56, 56)
    assert (batch["input_ids"][0] == hd.image_token_id).sum() == hd.num_image_tokens


@pytest.mark.parametrize(("image_grid", "image_global"), [(1, False), (2, False), (2, True)])
def test_views_have_the_configs_shapes(processor, image, image_grid, image_global):
    """The config says what the processor makes: black images and the model's check of its inputs rely on it."""
    sizes = {**tiny().to_dict(), "image_grid": image_grid, "image_global": image_global}
    sizes["vision_config_aux"]["image_size"] = 128
    config = MGMConfig(**sizes)
    views = build_processor(config, processor.tokenizer)(conversations=[CONVERSATION] * 2, images=[[image], [image]])
    assert (views["pixel_values"].shape, views["pixel_values_aux"].shape) == config.view_shapes(2)


def test_wrong_image_aspect_ratio(processor, image):
    """The message has the value and the choices."""
    with pytest.raises(ValueError, match="image_aspect_ratio is 'anyres': choose 'square' or 'pad'"):
        processor.image_views(image, "anyres")


def test_save_and_load_again(processor, tmp_path):
    """Settings, template and ids of a processor with those of its saved copy."""
    processor = MGMProcessor(processor.image_processor, processor.tokenizer, image_size=56, image_grid=2)
    processor.save_pretrained(tmp_path)
    loaded = MGMProcessor.from_pretrained(tmp_path)
    names = ("image_size", "patch_size", "image_aspect_ratio", "image_grid", "image_token_id", "chat_template")
    for name in names:
        assert getattr(loaded, name) == getattr(processor, name), name
    assert len(loaded.tokenizer) == len(processor.tokenizer)
    assert loaded.tokenize(CONVERSATION) == processor.tokenize(CONVERSATION)
