"""Data as the world has it: every kind of image, generated nonsense, and what data.check tells of a whole data set."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.batching import TrainCollator
from data.dataset import ConversationDataset, open_dataset
from data.images import MOVED
from data.lengths import measure_lengths
from mgm.processing_mgm import MGMProcessor
from models.loading import load_processor
from utils import UserError


ROOT = Path(__file__).parent.parent
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
GENERATED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same inputs in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def processor() -> MGMProcessor:
    return load_processor("data/tiny_mgm")


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def write(folder: Path, *images: str) -> Path:
    records = [{"id": name, "image": name, "conversations": TURNS} for name in images]
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3))


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40))


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(path, exif=exif)


def animated(path: Path) -> None:
    gradient().save(path, save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])


def palette_with_transparency(path: Path) -> None:
    gradient().quantize(8).save(path, transparency=0)


GOOD_IMAGES: dict[str, Callable[[Path], None]] = {
    "cmyk.jpg": lambda path: gradient().convert("CMYK").save(path),
    "palette.png": palette_with_transparency,
    "alpha.png": lambda path: gradient().convert("RGBA").save(path),
    "grey-alpha.png": lambda path: gradient().convert("LA").save(path),
    "bits.png": lambda path: gradient().convert("1").save(path),
    "16-bit.png": lambda path: sixteen_bit().save(path),
    "16-bit.tiff": lambda path: sixteen_bit().save(path),
    "exif-rotated.jpg": rotated,
    "animated.gif": animated,
    "animated.webp": animated,
    "1x1.png": lambda path: gradient(1, 1).save(path),
    "strip.png": lambda path: gradient(900, 9).save(path),
    "jpeg-called.png": lambda path: gradient().save(path, "JPEG"),
}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_kinds_of_images(name: str, tmp_path: Path, processor: MGMProcessor) -> None:
    """Whatever its mode, size or name, a good image comes out as RGB of its own size and through the processor."""
    GOOD_IMAGES[name](tmp_path / name)
    sample = open_dataset(write(tmp_path, name))[0]
    [image] = sample["images"]
    with Image.open(tmp_path / name) as original:
        assert image.mode == "RGB" and image.size == original.size
    for aspect_ratio in ("pad", "square"):
        batch = processor(conversations=[sample["conversations"]], images=[[image]], image_aspect_ratio=aspect_ratio)
        assert bool(batch["pixel_values"].isfinite().all()) and len(batch["pixel_values"]) == 1


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    """Not cut off at 255, which makes all but the darkest white."""
    sixteen_bit().save(tmp_path / "a.png")
    values = np.asarray(open_dataset(write(tmp_path, "a.png"))[0]["images"][0])[..., 0]
    assert values.min() == 0 and values.max() == 255 and len(np.unique(values)) == 256


@pytest.mark.parametrize("name", ["16-bit.png", "16-bit-rgb.png", "12-bit.pgm", "16-bit.pgm", "white-is-zero.tiff"])
def test_deep_pictures_are_scaled_by_what_the_file_says(name: str, tmp_path: Path) -> None:
    """The same ramp from black to white, whatever it is stored as."""
    path = tmp_path / name
    if name.endswith("pgm"):
        maximum = 4095 if "12" in name else 65535
        path.write_bytes(b"P5 64 64 %d\n" % maximum + ramp(maximum).astype(">u2").tobytes())
    elif name == "white-is-zero.tiff":
        Image.fromarray(65535 - ramp(65535)).save(path, tiffinfo={262: 0})
        path.write_bytes(path.read_bytes().replace(b"\x06\x01\x03\0\x01\0\0\0\x01", b"\x06\x01\x03\0\x01\0\0\0\0"))
    elif name == "16-bit-rgb.png":
        write_deep_png(path, 65535)
    else:
        Image.fromarray(ramp(65535)).save(path)
    values = np.asarray(open_dataset(write(tmp_path, name))[0]["images"][0])[..., 0]
    assert np.abs(values.astype(int) - ramp(255)).max() <= 1


@pytest.mark.parametrize("value", [0, 4000])
def test_a_plain_deep_picture_is_taken(value: int, tmp_path: Path) -> None:
    """All of one dark colour: there is nothing in it to be lost."""
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "a.png")
    assert open_dataset(write(tmp_path, "a.png"))[0]["images"][0].getpixel((0, 0))[0] == value >> 8


def ramp(maximum: int) -> np.ndarray:
    """A square that grows from 0 to `maximum` from left to right, 16 bits a value (floats up to 1)."""
    values = np.tile(np.linspace(0, maximum, 64), (64, 1))
    return values if maximum == 1 else values.astype(np.uint16)


def write_deep_png(path: Path, maximum: int) -> None:
    """The ramp as RGB with 16 bits a value, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.repeat(ramp(maximum)[..., None], 3, axis=2).astype(">u2")
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    gradient(200, 200).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)  # 50 KB that would become 1.2 GB


BAD_IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated.jpg": (truncated, "truncated"),
    "text.png": (lambda path: path.write_text("no picture"), "cannot be decoded"),
    "empty.png": (lambda path: path.touch(), "cannot be decoded"),
    "bomb.png": (bomb, "decompression bomb"),
    "20000x10.png": (lambda path: gradient(20_000, 10).save(path), "20000 x 10 pixels: as a square"),
    "4000x10.png": (lambda path: gradient(4000, 10).save(path), "more than 100 times"),
    "12-in-16.png": (lambda path: Image.fromarray(ramp(4095)).save(path), "none is above 4095, which is nearly black"),
    "12-in-16-rgb.png": (lambda path: write_deep_png(path, 4095), "which is nearly black: scale it and save it with"),
    "32-bit.tiff": (lambda path: Image.fromarray(ramp(65535).astype(np.int32)).save(path), "which of them is white"),
    "float.tiff": (lambda path: Image.fromarray(ramp(1).astype(np.float32)).save(path), "floating-point values"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name: str, tmp_path: Path, processor: MGMProcessor) -> None:
    """Record, file and reason in one line; skipped, the sample has no label, and what it would have had is known."""
    make, reason = BAD_IMAGES[name]
    make(tmp_path / name)
    path = write(tmp_path, name)
    with pytest.raises(UserError) as refused:
        open_dataset(path)[0]
    assert all(word in str(refused.value) for word in (f"record {name}", name, reason)), refused.value
    dataset = open_dataset(path, skips_bad=True)
    dataset.records = measure_lengths(dataset.records, processor, 2048)
    sample = dataset[0]
    assert sample["problem"] == str(refused.value) and sample["num_label_tokens"] > 0
    assert bool((TrainCollator(processor, 2048)([sample])["labels"] == -100).all())


def test_records_are_left_out(tmp_path: Path) -> None:
    """Each with its reason, and those around them are kept: bad types, paths that leave the folder, `<image>` without
    image and the reverse, a broken line, a missing file."""
    gradient().save(tmp_path / "a.png")
    good = {"id": "good", "image": "a.png", "conversations": TURNS}
    lines = [
        good,
        good | {"conversations": 5},
        good | {"conversations": [{"from": "human", "value": None}]},
        good | {"image": "/etc/hostname"},
        good | {"image": "../a.png"},
        good | {"image": "a\0.png"},
        good | {"image": None},
        good | {"image": ["a.png", "a.png"]},
        good | {"image": "b.png"},
        good | {"id": ["x"]},
        good | {"conversations": TURNS[:1]},
        [1, 2],
        good,
    ]
    path = tmp_path / "data.jsonl"
    content = "\r\n".join([*map(json.dumps, lines), "{broken", json.dumps(good)])
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    dataset = open_dataset(path, skips_bad=True)
    assert dataset.records["id"][:] == ["good"] * 3
    reasons = (
        "list of turns/strings 'from'/leaves/leaves/leaves/1 <image> placeholders but 0/1 <image> placeholders but 2"
    )
    reasons += "/no image/'id' must be/a reply from gpt/expected an object/not JSON"
    assert sorted(dataset.problems) == [*range(1, 12), 13]
    for problem, reason in zip(
        [dataset.problems[i] for i in sorted(dataset.problems)], reasons.split("/"), strict=True
    ):
        assert reason in problem


def test_odd_text_is_kept(tmp_path: Path, processor: MGMProcessor) -> None:
    """An empty reply, NUL, an id twice: taken as they are. A reply longer than the limit loses its end."""
    turns = [{"from": "human", "value": "a\0b"}, {"from": "gpt", "value": ""}]
    long = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "word " * 500}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": 1, "conversations": turns}, {"id": 1, "conversations": long}])
    )
    records = open_dataset(tmp_path / "data.json").records
    assert records["conversations"][0] == turns
    measured = measure_lengths(records, processor, 64)
    assert 0 < measured["num_label_tokens"][0] and measured["num_label_tokens"][1] == 64 - 10, "10 before it"


TEXT = st.text(max_size=30) | st.sampled_from(["<image>", "<image>\nWhat?", "<image><image>", "\0", "\ud800", "<eos>"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["a.png", "b.png", "../a.png", "/etc/hostname", "", "sub", "a.png\0", "link"])
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "user", "system"]) | JSON, "value": TEXT | JSON}
)
DIALOGUE = st.lists(TEXT, min_size=2, max_size=4).map(
    lambda texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "image": NAMES | st.lists(NAMES, max_size=3) | JSON,
        "conversations": DIALOGUE | st.lists(TURN, max_size=4) | JSON,
        "messages": JSON,
    },
)


def take_all(dataset: ConversationDataset, processor: MGMProcessor) -> None:
    """Everything train.py's loader does to the samples."""
    dataset.records = measure_lengths(dataset.records, processor, 96)
    kept = [i for i, labels in enumerate(dataset.records["num_label_tokens"]) if labels]
    for index in kept:
        TrainCollator(processor, 96)([dataset[index]])


@pytest.mark.slow
@GENERATED
@given(
    records=st.lists(RECORD | JSON, max_size=4),
    name=st.sampled_from(["data.json", "data.jsonl"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    cut=st.sampled_from([None, None, None, -1, -7]),
)
def test_generated_records(
    records: list, name: str, mark: bytes, newline: str, cut: int | None, tmp_path: Path, processor: MGMProcessor
) -> None:
    """150 files of nonsense: used, or refused with a UserError, never another exception; with `skips_bad` too."""
    folder = tmp_path / str(next(NUMBERS))
    folder.mkdir()
    gradient(8, 8).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"\x89PNG nonsense")
    (folder / "sub").mkdir()
    os.symlink("/etc/hostname", folder / "link")
    content = newline.join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    (folder / name).write_bytes(mark + content.encode()[:cut])
    for skips_bad in (False, True):
        try:
            take_all(open_dataset(folder / name, skips_bad=skips_bad), processor)
            event("used")
        except UserError as error:
            event("refused")
            assert str(error)


@pytest.mark.slow
@GENERATED
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), seed=st.integers(0, 10**6))
def test_generated_images(kind: str, seed: int, tmp_path: Path, processor: MGMProcessor) -> None:
    """150 image files with bytes changed, cut off or put in: used, or refused with a UserError."""
    generator, folder = random.Random(seed), tmp_path / str(next(NUMBERS))
    folder.mkdir()
    buffer = io.BytesIO()
    gradient(generator.randint(1, 60), generator.randint(1, 60)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(generator.randint(1, 6)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    if generator.random() < 0.3:
        content = content[: generator.randrange(len(content))]
    if generator.random() < 0.2:
        content[len(content) // 2 : len(content) // 2] = generator.randbytes(generator.randrange(500))
    (folder / "a.png").write_bytes(content)
    dataset = open_dataset(write(folder, "a.png"))
    try:
        sample = dataset[0]
        ratio = generator.choice(["pad", "square"])
        processor(conversations=[sample["conversations"]], images=[sample["images"]], image_aspect_ratio=ratio)
        event("used")
    except UserError as error:
        event("refused")
        assert "record a.png" in str(error)


NUMBERS = count()


@pytest.mark.slow
def test_check_walks_a_whole_data_set(tmp_path: Path) -> None:
    """One report of everything, in the order of records, and exit code 2; without what is bad exit code 0."""
    names = [f"{i}.png" for i in range(150)]
    for name in names:
        gradient().save(tmp_path / name)
    path = write(tmp_path, *names)
    records = json.loads(path.read_text())
    (tmp_path / "70.png").write_text("no picture")
    (tmp_path / "ocr_vqa").mkdir()
    (tmp_path / "9.png").rename(tmp_path / "ocr_vqa/9.png")
    records[9]["image"] = "ocr_vqa/9.jpg"
    (tmp_path / "149.png").unlink()
    records[3]["conversations"] = None
    records[5]["id"] = records[4]["id"]
    records[6]["conversations"] = [TURNS[0], {"from": "gpt", "value": ""}]
    path.write_text(json.dumps(records))
    done = check(str(path), "--model", "data/tiny_mgm", "--max_seq_len", "20")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "150 records, 3 cannot be used" in done.stdout and "100%" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bad"] == 3 and [
        any(word in p for p in result["problems"]) for word in ("record 3", "70.png", "149.png")
    ]
    assert result["notes"]["ids that several records share"] == 1
    assert result["notes"]["records with an empty reply"] == 1
    assert result["notes"][MOVED] == 1
    assert sum("20 tokens" in note for note in result["notes"]) >= 1

    path.write_text(json.dumps([record for i, record in enumerate(records) if i not in (3, 70, 149)]))
    done = check(str(path))
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["status"] == "good"


def check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
