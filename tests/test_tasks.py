"""The benchmarks' own formats: what is asked, with which image, and how answers are scored. Bad files in one line."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from evaluation.tasks import captions, mmbench, textvqa
from evaluation.tasks.mmbench import match_option
from evaluation.tasks.task import by_type, mean_score
from utils import UserError


TSV = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, format="png")
    return file.getvalue()


def write_textvqa(folder: Path, **changes) -> str:
    """Two questions in the format of TextVQA_0.5.1_val.json, and their images."""
    records = [
        {
            "question": "What brand is this?",
            "image_id": f"003a8ae2ef43b90{i}",
            "image_classes": ["Camera"],
            "flickr_original_url": "https://example.org/1.jpg",
            "image_width": 8,
            "image_height": 8,
            "answers": ["dakota"] * 8 + ["nous les gosses", "dakota digital"],
            "question_tokens": ["what", "brand", "is", "this"],
            "question_id": 34602 + i,
            "set_name": "val",
        }
        | changes
        for i in range(2)
    ]
    for i in range(2):
        (folder / f"003a8ae2ef43b90{i}.jpg").write_bytes(picture(["red", "blue"][i]))
    path = folder / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"dataset_type": "val", "dataset_version": "0.5.1", "data": records}))
    return str(path)


def write_mmbench(folder: Path, rows: list[list], header: str = TSV) -> str:
    path = folder / "mmbench_dev.tsv"
    path.write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return str(path)


def mmbench_row(index: int = 241, answer: str = "B", colour: str = "red") -> list:
    image = base64.b64encode(picture(colour)).decode()
    return [index, "What is it?", "Look.", "a cat", "a dog", "a cow", "", answer, "identity", image]


def write_captions(folder: Path) -> str:
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    texts = {1: "a cat sits on a mat", 2: "two dogs run in a park", 3: "a red bus on the street"}
    annotations = [{"id": i, "image_id": i, "caption": text} for i, text in texts.items()]
    annotations += [{"id": 10 + i, "image_id": i, "caption": f"{text} today"} for i, text in texts.items()]
    for i in (1, 2, 3):
        (folder / f"{i}.png").write_bytes(picture("red"))
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def test_textvqa_prompts(tmp_path):
    """As in LLaVA's prompts: without OCR words, with Rosetta's, and with LLaVA's own lines."""
    dataset = write_textvqa(tmp_path)
    task = textvqa.load(dataset, None)
    instruction = "Answer the question using a single word or phrase."
    assert task.questions[0].prompt == f"What brand is this?\n{instruction}"
    assert task.questions[1].images()[0].getpixel((0, 0)) == (0, 0, 255)

    rosetta = tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json"
    ids = [f"003a8ae2ef43b90{i}" for i in range(2)]
    words = {"data": [{"image_id": name, "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []} for name in ids]}
    rosetta.write_text(json.dumps(words))
    with_words = f"What brand is this?\nReference OCR token: DAKOTA, DIGITAL\n{instruction}"
    assert textvqa.load(dataset, None, ocr_file=str(rosetta)).questions[0].prompt == with_words

    llava = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"
    text = f"what brand is this?\nReference OCR token: DAKOTA\n{instruction}"
    llava.write_text("".join(json.dumps({"question_id": name, "image": "x", "text": text}) + "\n" for name in ids))
    assert textvqa.load(dataset, None, ocr_file=str(llava)).questions[0].prompt == text
    assert textvqa.question_of(f"Reference OCR token: A\nWhat?\n{instruction}") == "what?"


def test_textvqa_score(tmp_path):
    scores = textvqa.load(write_textvqa(tmp_path), None).score(["Dakota.", "nous les gosses"])
    assert [score.value for score in scores] == [1.0, pytest.approx(0.3)]
    assert [score.id for score in scores] == ["34602", "34603"] and by_type(scores) == {}


def test_mmbench_plain(tmp_path):
    """The original's prompt: hint, question, lettered options up to the first that is missing, instruction."""
    task = mmbench.load(write_mmbench(tmp_path, [mmbench_row(), mmbench_row(242, "A", "blue")]))
    assert task.questions[0].prompt == (
        "Look.\nWhat is it?\nA. a cat\nB. a dog\nC. a cow\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert task.questions[1].images()[0].getpixel((0, 0)) == (0, 0, 255)
    scores = task.score(["B", "a dog"])
    assert mean_score(scores) == 0.5
    assert by_type(scores) == {"identity": {"score": 0.5, "n": 2}}


def test_mmbench_circular(tmp_path):
    """Every rotation of the options has to be answered right; the answer's letter moves with its option."""
    dataset = write_mmbench(tmp_path, [mmbench_row()])
    task = mmbench.load(dataset, circular=True)
    assert [(choice.options[0], choice.answer) for choice in task.choices] == [
        ("a cat", "B"),
        ("a dog", "A"),
        ("a cow", "C"),
    ]
    for choice in task.choices:
        assert choice.options["ABC".index(choice.answer)] == "a dog"
    assert mean_score(task.score(["B", "A", "C"])) == 1
    assert mean_score(task.score(["B", "B", "B"])) == 0, "always the same letter is right in plain evaluation alone"
    assert mean_score(task.score(["C", "A", "C"])) == 0, "one wrong rotation is enough"
    assert len(task.score(["B", "A", "C"])) == 1


def test_mmbench_takes_the_files_own_copies(tmp_path):
    """Rows whose index is 1,000,000 higher are rotations; their image may be the index of the row that has it."""
    copy = mmbench_row(1_000_241, "A")
    copy[3:6] = ["a dog", "a cow", "a cat"]
    copy[-1] = "241"
    dataset = write_mmbench(tmp_path, [mmbench_row(), copy])
    assert len(mmbench.load(dataset).questions) == 1
    task = mmbench.load(dataset, circular=True)
    assert [question.id for question in task.questions] == ["241", "1000241"]
    assert task.questions[1].images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert mean_score(task.score(["B", "A"])) == 1 and mean_score(task.score(["B", "B"])) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B.", "B"),
        ("b", None),  # letters count as capitals
        ("A dog", "A"),  # an article that looks like an option: the official rules take it for one
        ("it is a Dog", "B"),
        ("A or B", None),
        ("AB", None),
        ("a cat and a dog", None),
        ("Z", None),
        ("", None),
        ("a horse", None),
        ("Cannot determine the answer B", None),
    ],
)
def test_option_matching(answer, expected):
    assert match_option(answer, ("a cat", "a dog", "a cow")) == expected


def test_captions_score(tmp_path):
    """CIDEr of COCO's evaluation: high for the references' own words, 0 for none, blind to case and stops."""
    task = captions.load(write_captions(tmp_path), None)
    assert task.questions[0].prompt == "Provide a one-sentence caption for the provided image."
    assert task.questions[0].references == ["a cat sits on a mat", "a cat sits on a mat today"]
    answers = ["a cat sits on a mat", "Two dogs run in a park.", "nothing here"]
    scores = [score.value for score in task.score(answers)]
    assert scores[0] > 8 and scores[1] > 8 and scores[2] == 0
    same = [score.value for score in task.score([answers[0].upper() + " !", *answers[1:]])]
    assert same == scores


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": ["a"] * 9}, ["question 34602", "10 answers"]),
        ({"question": None}, ["'data' 0", "'question'"]),
        ({"image_id": "elsewhere"}, ["elsewhere.jpg", "--image_folder"]),
    ],
)
def test_bad_textvqa(changes, words, tmp_path):
    with pytest.raises(UserError) as error:
        textvqa.load(write_textvqa(tmp_path, **changes), None)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_files(tmp_path):
    """Each in a line that names the file and what was expected of it."""
    empty = tmp_path / "empty.json"
    empty.write_text('{"data": []}')
    other = tmp_path / "other.json"
    other.write_text("[]")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    dataset = write_textvqa(tmp_path)
    no_answers = write_mmbench(tmp_path, [["1", "Q", "A"]], "index\tquestion\tA\n")
    for call, words in {
        lambda: textvqa.load(None, None): ["--task textvqa needs --dataset"],
        lambda: textvqa.load("nowhere.json", None): ["nowhere.json", "no such file"],
        lambda: textvqa.load(str(empty), None): ["empty.json", "no record"],
        lambda: textvqa.load(str(other), None): ["other.json", "'data'"],
        lambda: textvqa.load(str(broken), None): ["broken.json", "JSON"],
        lambda: textvqa.load(dataset, "nowhere"): ["--image_folder nowhere"],
        lambda: textvqa.load(dataset, None, ocr_file="none.json"): ["--ocr_file none.json"],
        lambda: textvqa.load(dataset, None, ocr_file=str(empty)): ["--ocr_file", "empty.json", "no record"],
        lambda: mmbench.load(no_answers): ["no column 'image'"],
        lambda: mmbench.load(str(tmp_path)): ["no such file"],
        lambda: captions.load(dataset, None): ["'images'"],
    }.items():
        with pytest.raises(UserError) as error:
            call()
        assert all(word in str(error.value) for word in words), error.value


def test_bad_mmbench(tmp_path):
    row = mmbench_row()
    for index, value, words in [(7, "D", "'D' is none of its 3 options"), (7, "", "no answers"), (9, "?", "base64")]:
        changed = [*row[:index], value, *row[index + 1 :]]
        with pytest.raises(UserError, match=words):
            mmbench.load(write_mmbench(tmp_path, [changed])).questions[0].images()
    with pytest.raises(UserError, match="no question"):
        mmbench.load(write_mmbench(tmp_path, []))


def test_captions_need_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Java"):
        captions.load(write_captions(tmp_path), None)


def test_links_out_of_the_image_folder(tmp_path):
    """Refused before the first question, and opened where they are meant."""
    dataset = write_textvqa(tmp_path)
    [image, *_] = sorted(tmp_path.glob("*.jpg"))
    (tmp_path / "elsewhere").mkdir()
    image.rename(tmp_path / "elsewhere" / image.name)
    folder = tmp_path / "images"
    folder.mkdir()
    for other in tmp_path.glob("*.jpg"):
        other.rename(folder / other.name)
    (folder / image.name).symlink_to(tmp_path / "elsewhere" / image.name)
    with pytest.raises(UserError, match="leaves the image folder by a link"):
        textvqa.load(dataset, str(folder))
    task = textvqa.load(dataset, str(folder), follow_links=True)
    assert all(question.images()[0].mode == "RGB" for question in task.questions)
