"""LLaVA files and images: what is read, what is cached, and how everything bad is named."""

import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_files import load_conversations
from torch.utils.data import DataLoader

import data.dataset
import data.sources
from chat.encoding import num_image_tokens
from chat.images import shrunk_size
from chat.messages import to_messages
from data.dataset import FEATURES, digest_records, open_dataset, open_image
from models.loading import load_processor
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
    with pytest.raises(UserError, match="neither made by Dataset.save_to_disk nor with .parquet files"):
        load_conversations(folder)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "other")
    with pytest.raises(UserError, match="other: expected a column 'conversations' or 'messages', found text"):
        load_conversations(folder / "other")


def test_a_file_is_read_once(folder, monkeypatch):
    """The second load maps the first one's Arrow file; a changed file is read again."""
    reads, read_json = [], data.sources._read_json

    def counted(file, path):
        reads.append(path)
        return read_json(file, path)

    monkeypatch.setattr(data.sources, "_read_json", counted)
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


RECORD = json.dumps(RECORDS[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{RECORD},]", r"after 1 records: .*, near .*\]\},\]\); is there a comma too many"),
        (f"[{RECORD}, {RECORD[:20]}", "after 1 records: .*premature EOF.*; the file ends too early: download"),
        (
            '[{"score": NaN, "id": 1}]',
            'after 0 records: .*near .*"score": NaN.*; NaN and Infinity are no JSON: write null',
        ),
        (
            '[{"id": 18446744073709551616}]',
            "after 0 records: .*overflow, near .*18446744.*; write whole numbers beyond 64",
        ),
        (f'{{"data": [{RECORD}]}}', "no record in it, but one object with an array 'data': save that array alone"),
        (RECORD, "no record in it, but one object with an array 'conversations': put it into an array"),
        (f"{RECORD}\n{RECORD}", "after 0 records: .*trailing garbage.*; is it .jsonl"),
        (
            '[{"id": "caf\xe9"}]',
            "after 0 records: .*invalid bytes in UTF8 string, near .*caf.*; save the file as UTF-8",
        ),
        ('[{"id": "a\nb"}]', "after 0 records: .*invalid character inside string.*; write line breaks and tabs"),
        ("// my data\n[]", "after 0 records: .*comment.*; JSON knows no comments: remove them"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "fetch it with git lfs pull"),
        ("\x1f\x8b\x08", "it is compressed: unpack it"),
        ("\xff\xfe[\0]\0", "it is UTF-16: save it as UTF-8"),
    ],
)
def test_files_that_people_bring(folder, content, message):
    """One line with the file, the record, the place and the remedy."""
    (folder / "data.json").write_bytes(content.encode("latin-1"))
    assert re.search(message, refusal(folder / "data.json")), refusal(folder / "data.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"video": "a.mp4"},
        {"image": None, "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, TURNS[1]]},
        {"image": None, "conversations": [{"from": "human", "value": "What happens?\n<video>"}, TURNS[1]]},
    ],
)
def test_videos_are_refused(folder, changes):
    """They would be trained on as text; left out where bad records are."""
    path = write(folder, [bad(), bad(**changes)])
    assert "record 1 (id x): it asks about a video" in refusal(path)
    assert list(open_dataset(path, skips_bad=True).problems) == [1]


def test_html_is_no_video(folder):
    """The word inside a text stays a text."""
    turns = [{"from": "human", "value": "What does <video> do in HTML?"}, {"from": "gpt", "value": "It plays."}]
    assert len(load_conversations(write(folder, [bad(image=None, conversations=turns)]))) == 1


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


def test_a_new_version_reads_an_old_file_again(folder, monkeypatch):
    """A cache that older code filled may hold what today's checks refuse."""
    path = write(folder, RECORDS)
    load_conversations(path)
    monkeypatch.setattr(data.dataset, "RECORDS_VERSION", data.dataset.RECORDS_VERSION + 1)
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


@pytest.fixture
def linked_folder(tmp_path: Path) -> Path:
    """An image folder with parts elsewhere, as LLaVA's is laid out: a folder and a file that are links."""
    for path in ("disk/coco", "images/gqa"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (20, 10), "red").save(tmp_path / path / "a.png")
    (tmp_path / "images/coco").symlink_to(tmp_path / "disk/coco")
    (tmp_path / "images/gqa/b.png").symlink_to(tmp_path / "disk/coco/a.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["coco/a.png", "gqa/b.png"])
def test_links_out_of_the_folder_are_found_at_once(linked_folder, name):
    """In whatever record they stand, with the flag that allows them; nothing is decoded for that."""
    path = write(linked_folder, [bad(image="gqa/a.png")] * 8 + [bad(image=name)] * 2)
    with pytest.raises(UserError, match=rf"record 8 \(id x\): image .*{name} leaves .* give --follow_links") as error:
        open_dataset(path)
    assert "2 records in all" in str(error.value)
    assert sorted(open_dataset(path, skips_bad=True).problems) == [8, 9]


@pytest.mark.parametrize("name", ["coco/a.png", "gqa/b.png"])
def test_links_that_are_meant(linked_folder, name):
    """They are opened, also in a worker; a name with .. in it is refused all the same."""
    samples = open_dataset(write(linked_folder, [bad(image=name)]), follow_links=True)
    assert [sample["images"][0].size for sample in DataLoader(samples, batch_size=None, num_workers=1)] == [(20, 10)]
    with pytest.raises(UserError, match="leaves the image folder"):
        open_dataset(write(linked_folder, [bad(image="../disk/coco/a.png")]), follow_links=True)


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("vg/VG_100K/2.jpg", "vg/images/2.jpg"),
        ("vg/VG_100K_2/3.jpg", "vg/images/3.jpg"),
        ("ocr_vqa/images/1.jpg", "ocr_vqa/images/1.png"),
    ],
)
def test_images_where_mgms_own_loader_looks(folder, named, lies):
    """Found and counted; where the record's own path exists it is taken; elsewhere no name is guessed at."""
    (folder / lies).parent.mkdir(parents=True)
    Image.new("RGB", (7, 5)).save(folder / lies)
    path = write(folder, [bad(), bad(image=named)])
    samples = open_dataset(path)
    assert samples[1]["images"][0].size == (7, 5) and samples.num_moved == 1
    (folder / named).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / named)
    samples = open_dataset(path)
    assert samples[1]["images"][0].size == (9, 9) and samples.num_moved == 0
    Image.new("RGB", (7, 5)).save(folder / "other.png")
    with pytest.raises(UserError, match="no image .*other.jpg"):
        open_dataset(write(folder, [bad(image="other.jpg")]))


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


README = (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")


def test_the_readmes_records_load(folder):
    """The examples in data/README.md with what it says."""
    llava, messages, interleaved, text = (json.loads(block.split("```")[0]) for block in README.split("```json")[1:])
    for name in interleaved["images"]:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "red.png", folder / name)
    first, second, third, last = load_conversations(write(folder, [llava, messages, interleaved, text]))
    assert first == {"id": llava["id"], "images": [llava["image"]], "conversations": llava["conversations"]}
    assert second["id"] == "1" and second["images"] == messages["images"]
    assert [turn["value"] for turn in second["conversations"]] == [
        turn["value"] for turn in llava["conversations"][:2]
    ]
    parts = to_messages(third["conversations"])
    assert parts[0] == {"role": "system", "content": [{"type": "text", "text": "Answer in one word."}]}
    assert parts[1]["content"] == interleaved["messages"][1]["content"]
    assert last["images"] == [] and to_messages(last["conversations"])[1]["content"][0]["text"].startswith("Lengths")


def test_the_readmes_parquet_file(folder, monkeypatch):
    """The code in data/README.md that writes one: its records and images are read back."""
    monkeypatch.chdir(folder)
    image = Image.new("RGB", (20, 10), "red")
    (code,) = (block.split("```")[0] for block in README.split("```python")[1:])
    exec(code, {"samples": [("What?", "A square.", image), ("And?", "Another.", image)]})
    dataset = open_dataset(folder / "train.parquet")
    assert dataset[1]["conversations"] == [
        {"from": "human", "value": "<image>\nAnd?"},
        {"from": "gpt", "value": "Another."},
    ]
    assert dataset[1]["images"][0].tobytes() == image.tobytes()


def test_the_readmes_counts():
    """How many tokens an image of 4000 x 3000 takes of a Qwen3-VL, as it is and shrunk."""
    qwen = load_processor("qwen3-vl-4b")
    counts = [num_image_tokens(qwen, size) for size in ((4000, 3000), shrunk_size((4000, 3000), 500_000))]
    assert f"takes {counts[0]:,} tokens of a Qwen3-VL, with `--max_image_pixels 500000` {counts[1]}." in README


MESSAGES = [  # as transformers has them: content is a string or parts
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
]


def png(color: str, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def embedded_rows(number: int = 5) -> list[dict]:
    """Rows with messages and with images as `datasets.Image` stores them, as wide as the row's number + 1."""
    return [
        {"id": f"{i:03}", "images": [{"bytes": png("red", (i + 1, 2)), "path": f"{i}.png"}], "messages": MESSAGES}
        for i in range(number)
    ]


def save_rows(folder: Path, rows: list[dict], form: str) -> Path:
    """The rows as a .parquet file, a folder of two of them, or a folder of Dataset.save_to_disk."""
    table = pa.Table.from_pylist(rows)
    if form == "file":
        pq.write_table(table, folder / "rows.parquet", row_group_size=2)
        return folder / "rows.parquet"
    path = folder / form
    if form == "saved":
        datasets.Dataset(table).save_to_disk(path)
        return path
    path.mkdir()
    for i, part in enumerate((table[:3], table[3:])):
        pq.write_table(part, path / f"train-0000{i}-of-00002.parquet")
    return path


@pytest.mark.parametrize("form", ["file", "folder", "saved"])
def test_images_inside_the_data_set(folder, monkeypatch, form):
    """Every row's turns and own image, also selected, shuffled, pickled and in a worker. The cache has no image."""
    cache = own_cache(folder, monkeypatch)
    rows = embedded_rows(5)
    for row in rows:
        row["images"][0]["bytes"] += os.urandom(100_000)  # PNG ends before
    samples = open_dataset(save_rows(folder, rows, form))
    assert samples.records["id"][:] == ["000", "001", "002", "003", "004"]
    assert samples.records[0]["conversations"] == TURNS_OF_MESSAGES
    assert sum(path.stat().st_size for path in cache.rglob("*.arrow")) < 20_000
    samples.records = samples.records.select([4, 2, 0, 3])
    assert [samples[i]["images"][0].size for i in range(4)] == [(5, 2), (3, 2), (1, 2), (4, 2)]
    assert pickle.loads(pickle.dumps(samples))[1] == samples[1]
    loader = DataLoader(samples, batch_size=None, num_workers=1)
    assert [(sample["id"], sample["images"][0].width) for sample in loader] == [
        ("004", 5),
        ("002", 3),
        ("000", 1),
        ("003", 4),
    ]


TURNS_OF_MESSAGES = [{"from": "user", "value": "<image>\nWhat is it?"}, {"from": "assistant", "value": "A square."}]


def test_a_row_of_a_large_row_group(folder):
    """Rows in the first, a middle and the last batch that is read of one row group."""
    path = folder / "many.parquet"
    pq.write_table(pa.Table.from_pylist(embedded_rows(100)), path)
    assert pq.read_metadata(path).num_row_groups == 1
    samples = open_dataset(path)
    assert [samples[i]["images"][0].width for i in (0, 31, 32, 70, 99)] == [1, 32, 33, 71, 100]


def test_what_datasets_itself_writes(folder):
    """Dataset.to_parquet and save_to_disk with a List(Image) column, and one Image column named `image`."""
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    turns = datasets.List({key: datasets.Value("string") for key in ("role", "content")})
    features = datasets.Features(images=datasets.List(datasets.Image()), messages=turns)
    saved = datasets.Dataset.from_list([{"images": [Image.new("RGB", (3, 4))], "messages": messages}], features)
    saved.to_parquet(folder / "list.parquet")
    saved.save_to_disk(folder / "list")
    single = datasets.Features(image=datasets.Image(), messages=turns)
    rows = [{"image": Image.new("RGB", (3, 4)), "messages": messages}]
    datasets.Dataset.from_list(rows, single).to_parquet(folder / "one.parquet")
    for name in ("list.parquet", "list", "one.parquet"):
        sample = open_dataset(folder / name)[0]
        assert sample["id"] == "0" and sample["images"][0].size == (3, 4)
        assert [turn["value"] for turn in sample["conversations"]] == ["<image>What?", "Red."]


def test_files_and_bytes_in_one_row(folder):
    """An entry without bytes is a file of the image folder; it is looked for at once."""
    messages = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "Both."}]
    images = [{"bytes": None, "path": "sub/blue.png"}, {"bytes": png("red"), "path": None}]
    path = save_rows(folder, [{"id": 7, "images": images, "messages": messages}], "file")
    assert [image.size for image in open_dataset(path)[0]["images"]] == [(10, 30), (20, 10)]
    (folder / "sub/blue.png").unlink()
    with pytest.raises(UserError, match=r"record 0 \(id 7\): no image .*blue.png"):
        open_dataset(path)


@pytest.mark.parametrize("form", ["data.json", "data.jsonl", "parquet"])
def test_messages_with_image_files(folder, form):
    """Messages and names of files, also from JSON; several images, text around them, and none."""
    parts = [{"type": "text", "text": "Left: "}, {"type": "image"}, {"type": "text", "text": "right?"}]
    many = [{"role": "user", "content": [*parts, {"type": "image", "index": 1}]}, MESSAGES[1]]
    text_only = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, MESSAGES[1]]
    rows = [{"images": ["red.png", "sub/blue.png"], "messages": many}, {"images": [], "messages": text_only}]
    path = save_rows(folder, rows, "file") if form == "parquet" else write(folder, rows, form)
    samples = open_dataset(path)
    assert samples.records.features == FEATURES
    assert samples[0]["conversations"][0] == {"from": "user", "value": "Left: <image>\nright?<image>\n"}
    assert [image.size for image in samples[0]["images"]] == [(20, 10), (10, 30)]
    assert samples[1]["id"] == "1" and samples[1]["images"] == []


def messages(content: object, role: str = "user") -> list[dict]:
    return [{"role": role, "content": content}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": None}, "'messages' must be a list of messages, found None"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": ["Hi"]}, "every message needs 'role' and 'content', found 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "every message needs 'role' and 'content'"),
        ({"messages": messages(None)}, "'content' must be a string or a list of parts, found None"),
        ({"messages": messages(["Hi"])}, "a part of 'content' must be of type text, .* found 'Hi'"),
        ({"messages": messages([{"type": "text", "text": None}])}, "a part of 'content' must be of type text"),
        ({"messages": messages([{"type": "video"}])}, "a part of 'content' must be of type text, .* or image"),
        ({"messages": messages("\ud800")}, "a part of 'content' must be of type text"),
        ({"messages": messages("Hi", "narrator")}, "a turn is from 'narrator'"),
        ({"messages": messages([{"type": "image"}])}, "1 <image> placeholders but 0 images"),
        ({"messages": messages("Hi"), "images": ["red.png"]}, "0 <image> placeholders but 1 images"),
        ({"messages": messages("Hi"), "images": [None]}, "'images' must be a file name or a list of them"),
        ({"messages": messages("<image>"), "images": ["../red.png"]}, "image ../red.png leaves the image folder"),
        (
            {
                "messages": messages([{"type": "image", "index": 1}, {"type": "image", "index": 0}]),
                "images": ["a", "b"],
            },
            "image 1 is asked for out of turn; put the images in order",
        ),
        ({"messages": messages("Hi")[:1]}, "expected a turn from human and a reply from gpt"),
    ],
)
def test_bad_messages_are_named(folder, record, message):
    """As strictly as LLaVA's turns: the record's number and what is wrong with it."""
    with pytest.raises(UserError, match=message) as error:
        load_conversations(write(folder, [{"messages": messages("Hi")}, record], "data.jsonl"))
    assert "data.jsonl, record 1 (id 1): " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"bytes": None, "path": None}]}, "'images' must be a file name or a list of them"),
        ({"images": [None]}, "'images' must be a file name or a list of them"),
        ({"images": None}, "1 <image> placeholders but 0 images"),
        ({"images": [{"bytes": b"", "path": ""}] * 2}, "1 <image> placeholders but 2 images"),
        ({"images": [{"bytes": None, "path": "/etc/passwd"}]}, "/etc/passwd leaves the image folder"),
        ({"messages": None}, "'messages' must be a list of messages"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder", "saved"])
def test_bad_rows_are_named(folder, changes, message, form):
    """The same from tables with images inside."""
    rows = embedded_rows(5)
    rows[3] |= changes
    path = save_rows(folder, rows, form)
    assert f"data set {path}, record 3 (id 003): " in refusal(path)
    with pytest.raises(UserError, match=message):
        load_conversations(path)


@pytest.mark.parametrize("form", ["file", "saved"])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "bomb"])
def test_an_image_inside_that_cannot_be_decoded(folder, form, kind):
    """One line that names the record and the image's number."""
    damage(folder, kind)
    rows = embedded_rows(3)
    rows[1]["images"][0]["bytes"] = (folder / "red.png").read_bytes()
    path = save_rows(folder, rows, form)
    samples = open_dataset(path)
    assert samples[2]["images"][0].size == (3, 2)
    with pytest.raises(UserError) as error:
        samples[1]
    assert str(error.value).startswith(f"record 001: image 0 in {path} cannot be decoded (")
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_file(folder):
    """At the start one line with the file; where it breaks during a run, one with the record."""
    path = save_rows(folder, embedded_rows(), "file")
    samples, content = open_dataset(path), path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(UserError, match="record 003: the images in .*rows.parquet cannot be decoded"):
        samples[3]
    assert "damaged (" in refusal(path)
    path.write_bytes(content[:4] + bytes(100) + content[104:])
    assert "cannot be read after " in refusal(path)
    path.write_bytes(b"")
    assert "damaged (" in refusal(path)


def test_parquet_files_that_do_not_belong_together(folder):
    """Two splits in a folder, and two files with other columns: say what to do."""
    (folder / "splits").mkdir()
    table = pa.Table.from_pylist(embedded_rows(1))
    for name in ("test", "train"):
        pq.write_table(table, folder / "splits" / f"{name}-00000-of-00001.parquet")
    assert r"files of several splits (test, train); move one's to a folder" in refusal(folder / "splits")
    (folder / "columns").mkdir()
    pq.write_table(table, folder / "columns/a.parquet")
    pq.write_table(table.drop_columns(["images"]), folder / "columns/b.parquet")
    assert "b.parquet: other columns than" in refusal(folder / "columns")
    pq.write_table(table.drop_columns(["messages"]), folder / "other.parquet")
    assert "expected a column 'conversations' or 'messages', found id, images" in refusal(folder / "other.parquet")


def test_a_changed_parquet_file_is_read_again(folder):
    """Also where only the second file of a folder changed."""
    path = save_rows(folder, embedded_rows(), "folder")
    assert load_conversations(path)["id"][-1] == "004"
    pq.write_table(pa.Table.from_pylist(embedded_rows(5)[:1]), path / "train-00001-of-00002.parquet")
    assert load_conversations(path)["id"][:] == ["000", "001", "002", "000"]


def test_a_hub_id(folder, monkeypatch):
    """load_dataset is asked for the split; what it returns is used in place, with nothing beside it needed."""
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.load_from_disk(save_rows(folder, embedded_rows(), "saved"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = open_dataset("owner/name-1.0")
    assert [sample["images"][0].width for sample in (samples[0], samples[4])] == [1, 5]
    load_conversations("owner/name:validation")
    assert asked == [("owner/name-1.0", "train"), ("owner/name", "validation")]
    write(folder, RECORDS)
    monkeypatch.chdir(folder.parent)
    assert len(open_dataset(f"{folder.name}/data.json")) == 3  # a path that exists is no hub id
    assert len(asked) == 2


@pytest.mark.parametrize("error", [ValueError("Unknown split"), ConnectionError("no network\nat all")])
def test_a_hub_id_that_cannot_be_had(monkeypatch, error):
    """One line with the id and the library's reason; a file that is missing is not looked for on the hub."""

    def fail(name: str, split: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    reason = str(error).partition("\n")[0]
    assert f"no such path, and it cannot be loaded from the hub ({reason})" in refusal(Path("owner/name"))
    for name in ("data/missing.json", "data/missing.jsonl", "data/missing.parquet", "a/b/c", "missing"):
        assert "no such file" in refusal(Path(name))


def test_the_digest_covers_what_is_trained_on():
    """Texts, image names and their order; neither ids nor how the records lie in memory."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "7"}]
    records = [{"id": str(i), "images": [f"{i}.png"], "conversations": turns} for i in range(5)]

    def digest(rows: list[dict]) -> str:
        return digest_records(datasets.Dataset.from_list(rows, features=FEATURES))["sha256"]

    in_pieces = [datasets.Dataset.from_list(records[part], features=FEATURES) for part in (slice(3), slice(3, 5))]
    same = digest(records)
    assert digest_records(datasets.concatenate_datasets(in_pieces)) == {"num_records": 5, "sha256": same}
    longer = datasets.Dataset.from_list([*records[::-1], *records], features=FEATURES)
    assert digest_records(longer.select(range(5, 10)))["sha256"] == same
    assert digest([record | {"id": "other"} for record in records]) == same
    relabelled = [turns[0], turns[1] | {"value": "8"}]
    assert digest([*records[:4], records[4] | {"conversations": relabelled}]) != same
    assert digest([*records[:4], records[4] | {"images": ["5.png"]}]) != same
    assert digest(records[::-1]) != same
