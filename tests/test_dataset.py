"""LLaVA files and images: what is read, what is cached, and how everything bad is named."""

import json
import os
import pickle
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import data.dataset
from data.dataset import FEATURES, load_conversations, open_dataset, open_image
from utils import UserError


TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
CHAT = [{"from": "human", "value": "Name a color."}, {"from": "gpt", "value": "Red."}]
RECORDS = [
    {"id": "007", "image": "red.png", "conversations": TURNS},
    {"id": "b", "conversations": CHAT},
    {
        "id": "c",
        "image": ["sub/blue.png", "red.png"],
        "conversations": [{"from": "human", "value": "<image>\n<image>\nWhich is wider?"}, TURNS[1]],
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    Image.new("RGBA", (10, 30), "blue").save(tmp_path / "sub/blue.png")
    return tmp_path


def write(folder: Path, records: object, name: str = "data.json") -> Path:
    path = folder / name
    lines = (json.dumps(record) for record in records) if name.endswith(".jsonl") else [json.dumps(records)]
    path.write_text("\n".join(lines))
    return path


def bad(**changes: object) -> dict:
    """A good record with some keys changed."""
    return {"id": "x", "image": "red.png", "conversations": TURNS, **changes}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_records_are_what_was_written(folder, name):
    """Ids as the strings they are, one image, none and several, every turn; from an array and from lines."""
    records = load_conversations(write(folder, RECORDS, name))
    assert records.features == FEATURES
    assert records["id"] == ["007", "b", "c"]
    assert records["images"] == [["red.png"], [], ["sub/blue.png", "red.png"]]
    assert records["conversations"] == [record["conversations"] for record in RECORDS]


def test_missing_and_numeric_ids(folder):
    """A record without an id gets its number; a number becomes a string; other keys are left out."""
    records = [{"conversations": CHAT, "source": "web"}, {"id": 3, "image": None, "conversations": CHAT}]
    loaded = load_conversations(write(folder, records))
    assert loaded["id"] == ["0", "3"]
    assert loaded["images"] == [[], []]
    assert loaded.column_names == ["id", "images", "conversations"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_byte_order_mark_and_windows_lines(folder, name):
    """A file as Windows editors save it, blank lines between, with the plain one."""
    path = write(folder, RECORDS, name)
    text = path.read_text().replace("}\n{", "}\r\n\r\n{") if name.endswith("l") else json.dumps(RECORDS, indent=1)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\r\n", "\n").replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert load_conversations(path)["id"] == ["007", "b", "c"]


def test_text_that_is_not_ascii(folder):
    """Characters of every size come back as they were."""
    text = "café – 数字 🙂\u2028end"
    record = {"id": "ü", "conversations": [CHAT[0], {"from": "gpt", "value": text}]}
    for name in ("data.json", "data.jsonl"):
        path = folder / name
        path.write_text(json.dumps([record] if name == "data.json" else record, ensure_ascii=False), encoding="utf-8")
        assert load_conversations(path)[0] == {"id": "ü", "images": [], "conversations": record["conversations"]}


def test_a_saved_data_set(folder):
    """A folder of Dataset.save_to_disk with the file that it was made from."""
    records = load_conversations(write(folder, RECORDS))
    records.save_to_disk(folder / "saved")
    assert load_conversations(folder / "saved").to_list() == records.to_list()


def test_folders_that_are_no_data_set(folder):
    """Any folder, and a data set with other columns: the message has the folder."""
    with pytest.raises(UserError, match="not a folder made by Dataset.save_to_disk"):
        load_conversations(folder)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "other")
    with pytest.raises(UserError, match="other: expected a single split with the columns id, images, conversations"):
        load_conversations(folder / "other")


def test_a_file_is_read_once(folder, monkeypatch):
    """The second load maps the first one's Arrow file; a changed file is read again."""
    reads, read_json = [], data.dataset._read_json

    def counted(file, path):
        reads.append(path)
        return read_json(file, path)

    monkeypatch.setattr(data.dataset, "_read_json", counted)
    path = write(folder, RECORDS)
    first = load_conversations(path)
    assert len(reads) == 1
    assert load_conversations(path).to_list() == first.to_list()
    assert len(reads) == 1
    write(folder, [{**RECORDS[0], "id": "008"}, *RECORDS[1:]])  # as many bytes as before
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000))
    assert load_conversations(path)["id"] == ["008", "b", "c"]
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "expected an object with 'conversations', found list"),
        ("text", "expected an object with 'conversations', found str"),
        ({"id": "x"}, "'conversations' must be a list of turns"),
        (bad(conversations=[]), "'conversations' must be a list of turns"),
        (bad(conversations={"from": "human"}), "'conversations' must be a list of turns"),
        (bad(conversations=["Hello"]), "every turn needs the strings 'from' and 'value'"),
        (bad(conversations=[{"from": "human"}]), "every turn needs the strings 'from' and 'value'"),
        (bad(conversations=[{"from": "human", "value": 3}]), "every turn needs the strings 'from' and 'value'"),
        (bad(conversations=[{"from": "narrator", "value": "Once"}]), "a turn is from 'narrator'"),
        (bad(conversations=[TURNS[0], TURNS[0]]), "two turns in a row are from 'human'"),
        (bad(conversations=TURNS[:1]), "expected a turn from human and a reply from gpt"),
        (bad(conversations=[CHAT[0], {"from": "gpt", "value": "<image>"}]), "a reply by 'gpt' contains <image>"),
        (bad(conversations=CHAT), "0 <image> placeholders but 1 images"),
        (bad(image=None), "1 <image> placeholders but 0 images"),
        (bad(image=["red.png", "red.png"]), "1 <image> placeholders but 2 images"),
        (bad(image=7), "'image' must be a file name or a list of them"),
        (bad(image=[""]), "'image' must be a file name or a list of them"),
        (bad(image="/etc/passwd"), "image /etc/passwd leaves the image folder"),
        (bad(image="../red.png"), r"image \.\./red.png leaves the image folder"),
        (bad(image="sub/../../red.png"), "leaves the image folder"),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_bad_record_is_named(folder, record, message, name):
    """The second record is bad: one line with the file, the record's number, its id and what is wrong."""
    path = write(folder, [RECORDS[0], record], name)
    with pytest.raises(UserError, match=message) as error:
        load_conversations(path)
    where = f"data set {path}, record 1" + (" (id x)" if isinstance(record, dict) else "")
    assert str(error.value).startswith(where + ": ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.json", "", "data.json: not a JSON array"),
        ("data.jsonl", "", "data.jsonl: there is no record in it"),
        ("data.json", "[]", "data.json: there is no record in it"),
        ("data.jsonl", "\n \n", "data.jsonl: there is no record in it"),
        ("data.json", '[{"id": "a"', "data.json: not a JSON array"),
        ("data.json", "no JSON", "data.json: not a JSON array"),
        ("data.json", '{"id": "a"}\n{"id": "b"}', "data.json: not a JSON array .*; is it .jsonl"),
        ("data.json", '{"id": "a"}', "data.json: there is no record in it"),
        ("data.jsonl", json.dumps(RECORDS[1]) + "\n\n{broken", "data.jsonl, line 3: not JSON"),
        ("data.jsonl", json.dumps(RECORDS), "record 0: expected an object with 'conversations', found list"),
    ],
)
def test_a_broken_file_is_named(folder, name, text, message):
    """Empty files and broken JSON: one line with the file."""
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_conversations(folder / name)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8(folder):
    """A UserError with the file, for both forms."""
    for name in ("data.json", "data.jsonl"):
        (folder / name).write_bytes(b'[{"id": "\xff\xfe"}]')
        with pytest.raises(UserError, match=name):
            load_conversations(folder / name)


def test_a_missing_file_and_a_missing_image_folder(folder):
    """The message has the path."""
    with pytest.raises(UserError, match=r"nowhere.json: no such file, give a LLaVA .json or .jsonl"):
        load_conversations(folder / "nowhere.json")
    with pytest.raises(UserError, match="--image_folder nowhere: no such folder"):
        open_dataset(write(folder, RECORDS), "nowhere")


def test_samples_have_their_images(folder):
    """Every image decoded to RGB, in order, from beside the file and from --image_folder."""
    samples = open_dataset(write(folder, RECORDS))
    (folder / "elsewhere").mkdir()
    for dataset in (samples, open_dataset(write(folder / "elsewhere", RECORDS), folder)):
        assert len(dataset) == 3
        assert [image.size for image in dataset[2]["images"]] == [(10, 30), (20, 10)]
        assert [image.mode for image in dataset[2]["images"]] == ["RGB", "RGB"]
        assert dataset[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
        assert dataset[1] == {"id": "b", "conversations": CHAT, "images": []}


def test_a_missing_image_is_found_at_once(folder):
    """Before anything is decoded: the record's number, its id and the path."""
    path = write(folder, [RECORDS[1], bad(image="gone.png")])
    with pytest.raises(UserError, match=r"record 1 \(id x\): no image .*gone.png; is --image_folder right"):
        open_dataset(path)


def damage(folder: Path, kind: str) -> None:
    """Put something that is no readable image of this folder in the place of red.png."""
    path = folder / "red.png"
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bomb":
        Image.new("1", (14_000, 14_000)).save(path)
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "bomb", "deleted", "link"])
def test_an_image_that_cannot_be_had(folder, kind):
    """One line that names the record and the file."""
    samples = open_dataset(write(folder, [bad()]))
    damage(folder, kind)
    with pytest.raises(UserError) as error:
        samples[0]
    reason = "leaves the image folder" if kind == "link" else "cannot be decoded"
    assert str(error.value).startswith(f"record x: image {folder / 'red.png'} {reason}")
    assert "\n" not in str(error.value)


def test_a_link_inside_the_folder_is_followed(folder):
    """Only links that lead out of the image folder are refused."""
    (folder / "link.png").symlink_to(folder / "sub/blue.png")
    assert open_dataset(write(folder, [bad(image="link.png")]))[0]["images"][0].size == (10, 30)


def test_an_error_from_a_worker_keeps_its_line(folder):
    """What a loader's worker raises with what the same sample raises here."""
    samples = open_dataset(write(folder, [bad()]))
    damage(folder, "truncated")
    with pytest.raises(UserError) as here:
        samples[0]
    with pytest.raises(UserError) as there:
        list(DataLoader(samples, batch_size=None, num_workers=1))
    assert str(there.value) == str(here.value)


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Arrow cache that nothing else writes to."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    return folder / "cache"


def refusal(path: Path) -> str:
    """The one line that loading ends with."""
    with pytest.raises(UserError) as error:
        load_conversations(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (bad(id=["a"]), "'id' must be a string or a whole number, found \\['a'\\]"),
        (bad(id=1.5), "'id' must be a string or a whole number, found 1.5"),
        (bad(id=True), "'id' must be a string or a whole number, found True"),
        (bad(image="", conversations=CHAT), "'image' must be a file name or a list of them, found \\[''\\]"),
        (bad(image=0, conversations=CHAT), "'image' must be a file name or a list of them, found 0"),
        (bad(image={}, conversations=CHAT), "'image' must be a file name or a list of them, found {}"),
        (bad(image="red\0.png"), "leaves the image folder"),
    ],
)
def test_odd_ids_and_images_are_not_guessed_at(folder, record, message):
    """What is neither an id nor a file name is refused; it does not turn into some text or into a text-only record."""
    with pytest.raises(UserError, match=message):
        load_conversations(write(folder, [RECORDS[0], record]))


def test_an_id_of_null_counts_as_none(folder):
    """null with the record's number; long numbers and leading zeros as they are."""
    given = [None, "", "003", 2**60]
    records = load_conversations(write(folder, [{"id": value, "conversations": CHAT} for value in given]))
    assert records["id"] == ["0", "", "003", str(2**60)]


def test_names_that_only_look_like_escapes(folder):
    """Dots at the start of a name, and `..` that stays inside, are fine."""
    load_conversations(write(folder, [bad(image=name) for name in ("..red.png", "...", "sub/../red.png", "a..b/c")]))


def test_text_that_arrow_cannot_hold(folder):
    """Half a surrogate pair, escaped in a line, and nesting deeper than Python's parser goes: one line."""
    (folder / "half.jsonl").write_text(json.dumps(bad(conversations=[CHAT[0], {"from": "gpt", "value": "\ud800"}])))
    assert "every turn needs the strings 'from' and 'value'" in refusal(folder / "half.jsonl")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    assert "line 1: not JSON" in refusal(folder / "deep.jsonl")


def test_records_before_broken_json_are_counted(folder):
    """So that the place can be found in a big file."""
    path = write(folder, RECORDS)
    path.write_text(path.read_text()[:-3])
    assert "after 2 records" in refusal(path)


def test_a_saved_data_set_is_checked_like_a_file(folder):
    """The same record from a folder; a folder of several splits; a damaged one."""
    escaping = {"id": "x", "images": ["../red.png"], "conversations": TURNS}
    datasets.Dataset.from_list([escaping]).save_to_disk(folder / "escape")
    assert "record 0 (id x): image ../red.png leaves the image folder" in refusal(folder / "escape")
    good = load_conversations(write(folder, RECORDS))
    datasets.DatasetDict({"train": good}).save_to_disk(folder / "splits")
    assert "of several splits, name one's" in refusal(folder / "splits")
    assert len(load_conversations(folder / "splits" / "train")) == 3
    next((folder / "splits" / "train").glob("*.arrow")).write_bytes(b"")
    (folder / "splits" / "train" / "state.json").touch()
    assert "damaged (" in refusal(folder / "splits" / "train")


def test_a_saved_data_set_saved_anew_is_read_anew(folder):
    """Two data sets in the same folder, one after the other."""
    for name in ("a", "b"):
        records = [{"id": name, "images": [], "conversations": CHAT}]
        datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
        assert load_conversations(folder / "saved")["id"] == [name]


def test_a_change_that_keeps_size_and_time_is_seen(folder):
    """As after `cp -p` or `rsync -t` from a corrected copy."""
    path = write(folder, RECORDS)
    before, first = path.stat(), load_conversations(path)
    write(folder, [{**RECORDS[0], "id": "008"}, *RECORDS[1:]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load_conversations(path)
    assert (first[0]["id"], second[0]["id"]) == ("007", "008")
    assert first._fingerprint != second._fingerprint


def test_new_rules_read_an_old_file_again(folder, monkeypatch):
    """A cache that older code filled may hold what today's checks refuse."""
    path = write(folder, RECORDS)
    load_conversations(path)
    monkeypatch.setattr(data.dataset.inspect, "getsource", lambda function: "def to_messages(): another")
    monkeypatch.setattr(data.dataset, "check_record", lambda record, index, path: pytest.fail("read again"))
    with pytest.raises(BaseException, match="read again"):
        load_conversations(path)


def test_a_failed_load_leaves_no_data_behind(folder, monkeypatch):
    """Nothing but lock files; the repaired file then loads, mapped from a single Arrow file."""
    cache = own_cache(folder, monkeypatch)
    refusal(write(folder, [*RECORDS, bad(image=7)]))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    records = load_conversations(write(folder, RECORDS))
    assert [Path(file["filename"]) for file in records.cache_files] == list(cache.rglob("*.arrow"))


@pytest.mark.parametrize("limit", [150, 50], ids=["warning", "error"])
def test_images_above_pillows_limit(folder, monkeypatch, limit):
    """Pillow only warns above MAX_IMAGE_PIXELS and raises above twice that: 20 x 10 pixels are refused by both."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match="record x: image .*red.png cannot be decoded .*decompression bomb"):
        open_dataset(write(folder, [bad()]))[0]


@pytest.mark.parametrize("exception", [SyntaxError("broken PNG file"), EOFError("no more"), IndexError("range")])
def test_whatever_a_decoder_raises_names_the_record(folder, monkeypatch, exception):
    """Pillow's decoders fail in many ways on a broken file; want of memory is not the file's fault."""

    def fail(*args: object) -> None:
        raise exception

    samples = open_dataset(write(folder, [bad()]))
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=f"record x: image .*red.png cannot be decoded \\({exception}\\)"):
        samples[0]
    exception = MemoryError()
    with pytest.raises(MemoryError):
        samples[0]


def test_links_to_folders_and_to_themselves(folder):
    """A linked folder outside is refused, as is a loop; an image folder that is itself a link is fine."""
    inside = folder / "sub"
    (inside / "out").symlink_to(folder)
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (folder / "link").symlink_to(inside)
    for name, message in (("out/red.png", "leaves the image folder"), ("loop.png", "cannot be decoded")):
        with pytest.raises(UserError, match=f"record x: image .*{name} {message}"):
            open_image(inside, name, "x")
    assert open_image(folder / "link", "blue.png", "x").size == (10, 30)


def test_exif_orientation_is_left_alone(folder):
    """MGM was trained on Image.open(...).convert("RGB")."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (8, 4)).save(folder / "turned.jpg", exif=exif)
    assert open_image(folder, "turned.jpg", "x").size == (8, 4)


def test_samples_come_from_workers(folder):
    """Also where workers are spawned: a data set that was pickled has the same samples."""
    samples = open_dataset(write(folder, RECORDS))
    assert pickle.loads(pickle.dumps(samples))[2] == samples[2]
    loader = DataLoader(samples, batch_size=None, num_workers=1)
    assert [(sample["id"], len(sample["images"])) for sample in loader] == [("007", 1), ("b", 0), ("c", 2)]


def test_the_readmes_record_loads(folder):
    """The example in data/README.md with what it says."""
    readme = (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")
    record = json.loads(readme.split("```json")[1].split("```")[0])
    loaded = load_conversations(write(folder, [record]))[0]
    assert loaded == {"id": record["id"], "images": [record["image"]], "conversations": record["conversations"]}
