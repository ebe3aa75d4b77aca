"""Lengths of a data set whose images have many sizes: told without decoding one, they are the processor's."""

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from test_encoding import SIZES, processor_of
from tiny_families import write_family
from transformers import ProcessorMixin

import data.dataset
import data.lengths
import data.sizes
from chat.images import shrink, shrunk_size
from data.batching import TrainCollator
from data.dataset import ConversationDataset, open_dataset
from data.lengths import with_lengths
from data.sizes import with_image_sizes
from data.spot_check import check_lengths, learned_text, samples_to_check
from layers.chunked_loss import IGNORE_INDEX
from models.loading import load_processor
from utils import UserError


FAMILIES = ["llava", "llava_onevision", "qwen2_5_vl", "smolvlm", "gemma4", "mllama", "internvl", "pixtral"]


def photo(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    size = SIZES[number % len(SIZES)]
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind)
    return file.getvalue()


def records() -> list[dict]:
    """One image, none, two with a word between them, three side by side and in a later turn."""
    questions = [
        ["<image>\nWhat?"],
        ["What?"],
        ["<image>\nand <image>?"],
        ["What is\n<image>", "<image><image>\nThis?"],
    ]
    made = []
    for i in range(24):
        asked = questions[i % 4]
        num_images = sum(question.count("<image>") for question in asked)
        turns = [turn for question in asked for turn in (human(question), {"from": "gpt", "value": f"Number {i}."})]
        made.append({"id": str(i), "image": [f"{i + k}.png" for k in range(num_images)], "conversations": turns})
    return made


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(photo(i, "PNG" if i % 2 else "JPEG"))
    (tmp_path / "data.json").write_text(json.dumps(records()))
    return tmp_path / "data.json"


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """The same with the images inside, in parquet."""
    rows = [
        {
            "id": record["id"],
            "images": [{"bytes": photo(int(name.split(".")[0])), "path": name} for name in record["image"]],
            "conversations": record["conversations"],
        }
        for record in records()
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet", batch_size=5)
    return tmp_path / "data.parquet"


def measured(path: Path, processor: ProcessorMixin, max_length: int = 2000, pixels: int = 0) -> ConversationDataset:
    dataset = open_dataset(path)
    dataset.records = with_lengths(dataset, processor, max_length, pixels)
    return dataset


def assert_right(dataset: ConversationDataset, processor: ProcessorMixin, max_image_pixels: int = 0) -> None:
    """Each record's counts are those of the batch that a loader makes of it."""
    collate = TrainCollator(processor, 2000, max_image_pixels)
    for index, record in enumerate(dataset.records):
        batch = collate([dataset[index]])
        assert record["num_tokens"] == batch["input_ids"].shape[1], record
        assert record["num_label_tokens"] == (batch["labels"] != IGNORE_INDEX).sum()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", ["files", "embedded"])
def test_lengths_of_mixed_sizes(name: str, source: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    """No image is decoded to count. Of all records, from files and from parquet."""
    path, processor = request.getfixturevalue(source), processor_of(name)
    with monkeypatch.context() as patched:
        patched.setattr("data.images.to_rgb", lambda image: pytest.fail("an image was decoded"))
        dataset = measured(path, processor)
    assert_right(dataset, processor)
    check_lengths(processor, dataset)


@pytest.mark.parametrize("name", FAMILIES)
def test_smaller_images(name: str, files: Path) -> None:
    """--max_image_pixels: no image has more, its aspect is kept, and the counts are those of the smaller images."""
    processor = processor_of(name)
    dataset = measured(files, processor, pixels=3000)
    assert_right(dataset, processor, 3000)
    check_lengths(processor, dataset, 3000)
    whole = measured(files, processor)
    if name in ("qwen2_5_vl", "pixtral"):
        assert sum(dataset.records["num_tokens"]) < sum(whole.records["num_tokens"])


def test_shrinking() -> None:
    image = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    small = shrink(image, 5000)
    assert small.size == shrunk_size((640, 480), 5000) == (81, 61) and 81 * 61 <= 5000
    assert small.tobytes() == shrink(image, 5000).tobytes() and shrink(image, 0) is image
    assert shrink(small, 5000) is small
    assert shrunk_size((100000, 1), 10) == (1000, 1), "no side vanishes"


def test_a_fixed_processor_reads_no_size(files: Path, monkeypatch) -> None:
    """MGM's and LLaVA's: nothing is opened."""
    monkeypatch.setattr(data.sizes, "read_size", lambda *_: pytest.fail("opened"))
    for processor in (load_processor("data/tiny_mgm"), processor_of("llava")):
        assert data.sizes.IMAGE_SIZES not in measured(files, processor).records.column_names
    with pytest.raises(pytest.fail.Exception):
        measured(files, processor_of("qwen2_5_vl"))


@pytest.mark.parametrize("source", ["files", "embedded"])
def test_sizes_are_read_once(source: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    """The cache serves the same files, and no longer once one has changed."""
    path = request.getfixturevalue(source)
    dataset = open_dataset(path)
    sizes = with_image_sizes(dataset)["image_sizes"]
    assert sizes[0] == [list(SIZES[0])] and sizes[1] == [] and sizes[2] == [list(SIZES[2]), list(SIZES[3])]
    monkeypatch.setattr(data.sizes, "size_of_image", lambda _: pytest.fail("read again"))
    monkeypatch.setattr(data.sizes, "read_size", lambda *_: (7, 7))
    assert with_image_sizes(open_dataset(path))["image_sizes"] == sizes
    if source == "files":
        (path.parent / "0.png").write_bytes(photo(1))
        assert with_image_sizes(open_dataset(path))["image_sizes"][0] == [[7, 7]]


@pytest.mark.parametrize("source", ["files", "embedded"])
def test_an_image_that_cannot_be_read(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Named in one line with its record, or skipped where bad samples are."""
    path = request.getfixturevalue(source)
    if source == "files":
        (tmp_path / "0.png").write_bytes(b"no image")
    else:
        broken = datasets.Dataset.from_parquet(str(path)).map(
            lambda row: {"images": [{"bytes": b"no image", "path": "x.png"}] if row["id"] == "0" else row["images"]}
        )
        broken.to_parquet(path)
    qwen = processor_of("qwen2_5_vl")
    with pytest.raises(UserError, match="^record 0: image .* cannot be decoded"):
        measured(path, qwen)
    dataset = open_dataset(path, skips_bad=True)
    dataset.records = with_lengths(dataset, qwen, 2000)
    assert dataset.records["image_sizes"][0] == [[640, 480]] and dataset.records["num_label_tokens"][0] > 0
    check_lengths(qwen, dataset)


def test_a_disagreement_is_named(files: Path, monkeypatch) -> None:
    """A processor that counts its images' tokens wrongly: the record, both numbers and the sizes, in one line."""
    qwen = processor_of("qwen2_5_vl")
    dataset = measured(files, qwen)
    longest = max(range(24), key=lambda i: dataset.records[i]["num_tokens"])
    right = dataset.records["num_tokens"]
    wrong = [count + (i == longest) for i, count in enumerate(right)]
    dataset.records = dataset.records.remove_columns("num_tokens").add_column("num_tokens", wrong)
    with pytest.raises(UserError, match=rf"^record {longest}: .* makes {right[longest]} tokens of it, but") as error:
        check_lengths(qwen, dataset)
    assert "\n" not in str(error.value) and " x " in str(error.value)


def test_which_samples_are_looked_at(files: Path) -> None:
    """The longest, the one with most images, and those with the most extreme images; text is not."""
    dataset = measured(files, processor_of("qwen2_5_vl"))
    chosen = samples_to_check(dataset)
    sizes = [size for index in chosen for size in dataset.records["image_sizes"][index]]
    assert [29, 28] in sizes and [640, 480] in sizes and [57, 513] in sizes and [300, 50] in sizes
    assert all(dataset.records["images"][index] for index in chosen) and len(chosen) <= 6
    text = dataset.records.filter(lambda record: not record["images"])
    dataset.records = text
    assert samples_to_check(dataset) == []


def test_what_is_learned_is_shown(files: Path) -> None:
    """The first and the last record's replies, with what ends them."""
    dataset = measured(files, processor_of("smolvlm"))
    assert learned_text(processor_of("smolvlm"), dataset) == [
        "Learned of record 0: 'Number 0.<|im_end|>'",
        "Learned of record 23: 'Number 23.<|im_end|>' and 1 more reply",
    ]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([human("What is <|image_pad|>?")], "record 0: 0 images, but 1 times <|image_pad|>"),
        ([human("<image>\nWhat?")], "the model reads text only"),
        ([{"from": "system", "value": "Be brief."}, human("What?")], "move its text into the first human turn"),
    ],
    ids=["token", "text-only", "system"],
)
def test_what_a_model_cannot_take(turns: list[dict], message: str, tmp_path: Path) -> None:
    """Each is one line that names the record."""
    (tmp_path / "0.png").write_bytes(photo(0))
    record = {"id": "0", "conversations": [*turns, {"from": "gpt", "value": "It."}]}
    if "<image>" in turns[0]["value"]:
        record["image"] = "0.png"
    (tmp_path / "data.json").write_text(json.dumps([record]))
    processors = {"text only": "llama", "image_pad": "qwen2_5_vl"}
    name = next((name for words, name in processors.items() if words in message), None)
    processor = processor_of(name) if name else load_processor("data/tiny_mgm")
    with pytest.raises(UserError) as error:
        measured(tmp_path / "data.json", processor)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_system_turn(tmp_path: Path) -> None:
    """For a family whose template takes it."""
    turns = [{"from": "system", "value": "Be brief."}, human("What?"), {"from": "gpt", "value": "It."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    processor = processor_of("qwen3_vl")
    dataset = measured(tmp_path / "data.json", processor)
    batch = TrainCollator(processor, 100)([dataset[0]])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>")


def test_a_processor_with_other_settings(files: Path, tmp_path: Path) -> None:
    """The same tokenizer and template, and images of fewer pixels: what was counted for the one is not the other's."""
    write_family("qwen2_5_vl", tmp_path / "model")
    path = tmp_path / "model/processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"]["longest_edge"] = 28 * 28 * 6
    path.write_text(json.dumps(settings))
    smaller = load_processor(str(tmp_path / "model"))
    whole, dataset = measured(files, processor_of("qwen2_5_vl")), measured(files, smaller)
    assert sum(dataset.records["num_tokens"]) < sum(whole.records["num_tokens"])
    assert_right(dataset, smaller)
