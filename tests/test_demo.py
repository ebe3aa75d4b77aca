"""The demo's files against the scans they were made from."""

import json
from pathlib import Path

import pytest
from PIL import Image

from chat.messages import to_messages
from data import demo as demo_data
from data.demo import DEMO_QUESTIONS, IMAGE_SIDE, demo_samples, draw_number, ensure_demo, load_scans, write_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("data") / "demo")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scan_indices(split: str) -> set[int]:
    return {scan.index for scans in load_scans(split).values() for scan in scans}


def test_no_scan_is_in_both_splits():
    train, validation = scan_indices("train"), scan_indices("validation")
    assert not train & validation
    assert len(train | validation) == 1797
    assert all(load_scans("validation")[digit] for digit in range(10))


def test_images_are_drawn_from_their_own_split(monkeypatch, tmp_path):
    """Every scan that reaches an image of a split comes from that split."""
    drawn = []
    original = draw_number

    def spy(scans, rng):
        drawn.append({scan.index for scan in scans})
        return original(scans, rng)

    monkeypatch.setattr(demo_data, "draw_number", spy)
    monkeypatch.setattr(demo_data, "NUM_IMAGES", {"train": 40, "validation": 20})
    ensure_demo(tmp_path / "demo")
    assert set().union(*drawn[:40]) <= scan_indices("train")
    assert set().union(*drawn[40:]) <= scan_indices("validation")


def test_bytes_are_the_same_each_time(demo, tmp_path):
    assert read_files(ensure_demo(tmp_path / "demo")) == read_files(demo)


def test_a_current_demo_is_left_alone(demo):
    before = (demo / "train.json").stat().st_mtime_ns
    assert ensure_demo(demo) == demo
    assert (demo / "train.json").stat().st_mtime_ns == before


def test_a_demo_of_another_version_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_data, "NUM_IMAGES", {"train": 2, "validation": 2})
    folder = ensure_demo(tmp_path / "demo")
    (folder / "version.txt").write_text("0")
    (folder / "train.json").write_text("[]")
    ensure_demo(folder)
    assert json.loads((folder / "train.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_slower_of_two_processes_takes_the_faster_ones_demo(monkeypatch, tmp_path):
    """While one call writes, another finishes: the first gives way without an error and leaves nothing behind."""
    monkeypatch.setattr(demo_data, "NUM_IMAGES", {"train": 2, "validation": 2})
    folder, original = tmp_path / "demo", write_demo

    def slow_write(partial):
        monkeypatch.setattr(demo_data, "write_demo", original)
        ensure_demo(folder)
        original(partial)

    monkeypatch.setattr(demo_data, "write_demo", slow_write)
    assert ensure_demo(folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_are_llava_conversations(demo, split):
    samples = json.loads((demo / f"{split}.json").read_text())
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.keys() == {"id", "image", "conversations"}
        assert sample["id"].rsplit("-", 1)[1] in DEMO_QUESTIONS
        question, answer = to_messages(sample["conversations"])
        assert [part["type"] for part in question["content"]] == ["image", "text"]
        assert answer["content"][0]["text"]
    with Image.open(demo / samples[0]["image"]) as image:
        assert image.size == (IMAGE_SIDE, IMAGE_SIDE) and image.mode == "RGB"


def test_answers_follow_from_the_digits():
    samples = demo_samples("train-00000", "images/train-00000.png", [4, 0, 7], DEMO_QUESTIONS.keys())
    answers = {sample["id"]: sample["conversations"][1]["value"] for sample in samples}
    expected = {"number": "407", "parity": "odd", "sum": "11", "largest": "7"}
    assert answers == {f"train-00000-{name}": answer for name, answer in expected.items()}


def test_answers_about_an_image_agree_with_its_number(demo):
    by_image = {}
    for sample in json.loads((demo / "validation.json").read_text()):
        question_type = sample["id"].rsplit("-", 1)[1]
        by_image.setdefault(sample["image"], {})[question_type] = sample["conversations"][1]["value"]
    for answers in by_image.values():
        digits = [int(digit) for digit in answers["number"]]
        assert len(digits) in (2, 3) and digits[0] > 0
        assert answers == {name: DEMO_QUESTIONS[name][1](digits) for name in answers}
        assert answers.keys() >= {"number", "parity"}
