"""The worst case of a batch has the form of what the processor and the collators make of real conversations."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from forked_runs import run
from PIL import Image
from test_encoding import VISION, processor_of
from tiny_families import FAMILIES, TIMM_FAMILIES, build_tiny_model
from transformers import AutoConfig, ProcessorMixin

from chat.arguments import image_token_ids, per_token
from chat.encoding import num_image_tokens
from data.batching import TrainCollator
from data.packing import PackedCollator
from data.worst_case import Row, longest_row, worst_case_batch, worst_case_questions
from layers.chunked_loss import IGNORE_INDEX
from memory.config import ProbeConfig
from memory.measure_cpu import measure_cpu
from memory.predict import predict
from memory.trace import trace_single
from mgm.configuration_mgm import PRESETS, hd
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.processing_mgm import MGMProcessor, build_processor
from models.generation import generate_tokens
from models.loading import load_processor
from step import StepConfig
from utils import UserError


ROOT = Path(__file__).parent.parent
SMALL = ["tiny", "tiny-hd"]
SLOW = [pytest.mark.slow]


def processor_of_preset(preset: str, processor: MGMProcessor) -> MGMProcessor:
    """The processor of a preset's sizes, with the tiny model's tokenizer."""
    return build_processor(PRESETS[preset](), processor.tokenizer)


def sample(num_images: int) -> dict:
    """A question, and a reply, about images that are no squares."""
    turns = [{"from": "human", "value": "<image>" * num_images + "What?"}, {"from": "gpt", "value": "No."}]
    return {"id": "0", "conversations": turns, "images": [Image.new("RGB", (320, 240))] * num_images}


def forms(batch: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Dtype and shape of each tensor. How many positions have a label is the data's: there it is the rank."""
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    shapes["label_positions"] = len(shapes["label_positions"])
    return {name: (tensor.dtype, shapes[name]) for name, tensor in batch.items()}


def assert_same_form(real: dict[str, torch.Tensor], preset: str, packing: bool = False, num_images: int = 1) -> None:
    """`real` against the worst case of as many rows of its length."""
    rows, length = real["input_ids"].shape
    flags = {"per_device_train_batch_size": rows, "max_seq_len": length, "packing": packing}
    worst = worst_case_batch(load_processor(preset), StepConfig(model="tiny", **flags), Row(length, num_images))
    assert forms(worst) == forms(real)
    assert len(worst["label_positions"]) >= len(real["label_positions"])


@pytest.mark.parametrize("preset", PRESETS)
def test_an_image_of_every_preset(preset, processor):
    """A real image at the preset's own sizes: as many positions, and every tensor's shape and dtype."""
    ours = processor_of_preset(preset, processor)
    assert ours.num_image_tokens == PRESETS[preset]().num_image_tokens
    assert_same_form(TrainCollator(ours, 4096)([sample(1)]), preset)


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("preset", SMALL)
def test_rows_of_several_images_and_of_none(preset, rows, num_images, processor):
    """Batches of equal rows; without an image there are no views."""
    batch = TrainCollator(processor_of_preset(preset, processor), 1000)([sample(num_images)] * rows)
    assert ("pixel_values" in batch) == (num_images > 0)
    assert_same_form(batch, preset, num_images=num_images)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("preset", ["tiny-hd", "mgm-2b"])
def test_packed_rows(preset, rows, processor):
    """Samples of one and of two images share a row: the worst case of two has room for all five."""
    collate = PackedCollator(processor_of_preset(preset, processor), 4096)
    batch = collate([[sample(2), sample(1), sample(2)]] * rows)
    assert batch["input_ids"].shape[1] // PRESETS[preset]().num_image_tokens == 5, "text takes less than an image"
    assert_same_form(batch, preset, packing=True, num_images=2)
    assert_same_form(collate([[sample(0)] * 4] * rows), preset, packing=True, num_images=0)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("num_images", [0, 2])
def test_hd_images_are_predicted_and_run(num_images, packing):
    """The prediction for a CPU is within 0.02 % of the profiler's memory events."""
    flags = {"model": "tiny-hd", "mixed_precision": "no", "max_seq_len": 250, "lora_r": 4}
    config = ProbeConfig(mode="predict", device="cpu", **flags, images_per_sample=num_images, packing=packing)
    measured_bytes = measure_cpu(config, config.launch)
    assert trace_single(config).peak_bytes == pytest.approx(measured_bytes, rel=2e-4)


@pytest.mark.slow
def test_hd_images_under_zero3():
    """There the batch is made of fake tensors that are moved. By hand: 4 bytes a number for both views of an image, 8
    bytes a position for ids, labels and mask, and once more for where images and labels are, in blocks of 512."""
    config = ProbeConfig(model="tiny-hd", mode="predict", strategy="zero3", max_seq_len=200)
    batch_bytes = predict(config)["breakdown"]["batch"]
    assert 0 <= batch_bytes - 4 * 3 * (128**2 + 5 * 56**2) - 4 * 8 * 200 < 7 * 512


@pytest.mark.parametrize("preset", [pytest.param(name, marks=[] if name in SMALL else SLOW) for name in PRESETS])
def test_every_preset_is_predicted(preset):
    """On a GPU in bf16: at the peak there are at least its weights, two bytes each, and what is trained."""
    with torch.device("meta"):
        num_weights = MGMForConditionalGeneration(PRESETS[preset]()).num_parameters()
    result = predict(ProbeConfig(model=preset, mode="predict", device="cuda", max_seq_len=4096))
    assert result["peak_allocated_bytes"] > 2 * num_weights
    assert result["breakdown"]["batch"] > 4 * PRESETS[preset]().vision_config_aux.image_size ** 2 * 3


def test_the_longest_row():
    """The longest; the most images that any record has, but no more than the row can hold: 16 tokens each."""
    processor = load_processor("tiny")
    records = datasets.Dataset.from_dict({"images": [["a"] * 3, ["b"], []]})
    assert longest_row(records, np.array([20, 60, 40]), processor) == Row(60, 3)
    assert longest_row(records, np.array([20, 40]), processor) == Row(40, 2)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two conversations about an image each."""
    conversations = [sample(1) | {"id": str(i), "image": f"{i}.png"} for i in range(2)]
    for record in conversations:
        record.pop("images")[0].save(tmp_path / record["image"])
    (tmp_path / "records.json").write_text(json.dumps(conversations))
    return tmp_path / "records.json"


@pytest.fixture
def hd_model(tmp_path: Path, processor: MGMProcessor) -> Path:
    """The demo's model, looking at images in four crops and as a whole."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "data/tiny_mgm", folder)
    config = hd(AutoConfig.from_pretrained(folder))
    config.save_pretrained(folder)
    build_processor(config, load_processor(str(folder)).tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_hd_is_rehearsed_and_trained(hd_model, records, tmp_path):
    """train.py for two steps, the largest batch before them."""
    flags = "--max_steps 2 --save_steps 0 --logging_steps 1 --eval_samples 0 --dataloader_num_workers 0"
    flags += f" --per_device_train_batch_size 2 --dataset {records} --model {hd_model}"
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path / "logs")
    assert ended.code == 0, ended.err[-3000:]
    assert ended.result["status"] == "done"


# Of every other family: the same by the family's own processor.

SIZE, LENGTH = (100, 80), 600


def real_batch(processor: ProcessorMixin, rows: int, num_images: int) -> dict[str, torch.Tensor]:
    """A question about images with a word between them, as a loader makes it."""
    turns = [{"from": "human", "value": "x".join(["<image>"] * num_images) + "What?"}, {"from": "gpt", "value": "No."}]
    images = [Image.new("RGB", SIZE)] * num_images
    return TrainCollator(processor, 1000)([{"conversations": turns, "images": images}] * rows)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("name", VISION)
def test_every_familys_largest_batch(name: str, num_images: int, rows: int) -> None:
    """The real batch's arguments: the same names, dtypes and images, rows as long as they are said to be."""
    processor = processor_of(name)
    config = StepConfig(model="tiny", per_device_train_batch_size=rows, per_device_eval_batch_size=rows)
    row = Row(LENGTH, num_images, SIZE)
    real, worst = real_batch(processor, rows, num_images), worst_case_batch(processor, config, row)
    assert real.keys() == worst.keys()
    tokens = per_token(real)
    for key, value in worst.items():
        assert value.dtype == real[key].dtype, key
        if key in tokens:
            assert value.shape == (rows, LENGTH, *real[key].shape[2:]), key
        elif key != "label_positions":
            assert value.shape == real[key].shape, key
    is_image = torch.isin(worst["input_ids"], image_token_ids(processor))
    assert is_image.sum() == torch.isin(real["input_ids"], image_token_ids(processor)).sum()
    assert torch.equal(worst["labels"] == IGNORE_INDEX, is_image)
    assert len(worst["label_positions"]) == (~is_image[:, 1:]).sum()
    assert worst["attention_mask"].sum() == rows * LENGTH - (rows > 1)

    asked = worst_case_questions(processor, config, row)
    assert asked.keys() == real.keys() - {"labels", "label_positions"}
    assert asked["input_ids"].shape == (rows, LENGTH - 1) and asked["attention_mask"].sum() == rows * (LENGTH - 1) - (
        rows > 1
    )
    assert asked["attention_mask"][-1, 0] == (rows == 1), "padded on the left"
    is_image = torch.isin(asked["input_ids"], image_token_ids(processor))
    assert torch.equal(is_image.sum(1), torch.isin(worst["input_ids"], image_token_ids(processor)).sum(1))
    assert (asked["attention_mask"].bool() | ~is_image).all(), "no image is masked"


@pytest.mark.parametrize("num_images", [0, 2])
@pytest.mark.parametrize("name", [name for name in VISION if name not in TIMM_FAMILIES])
def test_every_family_takes_its_largest_batch(name: str, num_images: int) -> None:
    """The model runs on it: image tokens and features agree. So does generation on the questions."""
    processor, model = processor_of(name), build_tiny_model(FAMILIES[name]())
    config = StepConfig(model="tiny", per_device_train_batch_size=2, per_device_eval_batch_size=2)
    row = Row(LENGTH, num_images, SIZE)
    batch = worst_case_batch(processor, config, row)
    del batch["label_positions"]
    assert model.train()(**batch).loss.isfinite()
    questions = worst_case_questions(processor, config, row)
    assert generate_tokens(model.eval(), questions, max_new_tokens=2).shape == (2, 2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_images_that_do_not_fit(name: str) -> None:
    """As many positions as they take by their size; smaller images fit."""
    processor, config = processor_of(name), StepConfig(model="tiny")
    count = num_image_tokens(processor, (640, 480), 3)
    with pytest.raises(UserError, match=f"3 images take {3 * count} positions, but max_seq_len is {3 * count - 1}"):
        worst_case_batch(processor, config, Row(3 * count - 1, 3, (640, 480)))
    config.max_image_pixels = 56 * 56
    smaller = num_image_tokens(processor, (64, 48), 3)
    assert worst_case_batch(processor, config, Row(3 * smaller + 2, 3, (640, 480)))["input_ids"].shape[0] == 1
    with pytest.raises(UserError, match="the model has no vision side, so it takes 0"):
        worst_case_batch(processor_of("llama"), config, Row(100, 1))


@pytest.mark.parametrize("rows", [1, 2])
def test_text_alone(rows: int) -> None:
    """A language model's largest batch is the same with its tokenizer and without one."""
    config = StepConfig(model="tiny", per_device_train_batch_size=rows, per_device_eval_batch_size=rows)
    for make in (worst_case_batch, worst_case_questions):
        with_tokenizer, without = (make(processor, config, Row(50, 0)) for processor in (processor_of("llama"), None))
        assert {k: (v.shape, v.dtype) for k, v in with_tokenizer.items()} == {
            k: (v.shape, v.dtype) for k, v in without.items()
        }


def test_the_largest_image() -> None:
    """The one with most pixels, when it has been shrunk; as many as fit of it."""
    sizes = [[(100, 80), (60, 150)], [], [(640, 480)], [(300, 2)]]
    records = datasets.Dataset.from_dict({"images": [["a"] * len(row) for row in sizes], "image_sizes": sizes})
    qwen = processor_of("qwen2_5_vl")
    count = num_image_tokens(qwen, (640, 480), 2)
    assert longest_row(records, np.array([200]), qwen) == Row(200, 2, (640, 480))
    assert longest_row(records, np.array([2 * count - 1]), qwen) == Row(2 * count - 1, 1, (640, 480))
    assert longest_row(records, np.array([200]), qwen, max_image_pixels=500).image_size == (100, 80), (
        "500 pixels of it"
    )
