"""docs/report.md and the pictures of docs/: what `python -m benchmarks.report` makes of results/, and nothing else."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.architecture import lora_parameters
from benchmarks.charts import OURS
from benchmarks.pairs import GPU_FILES, gpu_pairs
from benchmarks.pictures import FOLDER, PICTURES, SCHEMES, picture
from benchmarks.plan_tables import SAMPLES, SWEPT
from benchmarks.report import BROWSERS, REPORT, digest, print_pdf
from benchmarks.report_numbers import LOGITS, MARKER, report_numbers, with_numbers
from benchmarks.rows import read_result
from benchmarks.tables import DEFAULTS
from utils import MIB, UserError


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXT = REPORT.read_text()
PDF = REPORT.with_suffix(".pdf")
PAGES = {"": "#ffffff", "-dark": "#0d1117"}  # GitHub's
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# What the failure was that the project began with: the card, its computer, the flags, the message.
STORY = {"4090", "24", "64", "1", "1024", "500.00", "22.66"}
# The size of the model in its name's words, of a number in bf16, of an interval; the settings are compared below.
WORDS = {"3", "2", "95"}


def plain(svg: str) -> tuple[list[str], list[float]]:
    """An SVG without its numbers, and those. Ids are hashes of paths, whose last digits may differ by processor."""
    svg = re.sub(r"\b[a-z][0-9a-f]{10}\b", "id", svg)
    return NUMBER.split(svg), [float(number) for number in NUMBER.findall(svg)]


def labels(svg: str) -> list[str]:
    return re.findall(r">([^<>\n]+)</(?:text|tspan)>", svg)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_generated(name, scheme):
    """As `python -m benchmarks.report` would draw them now: each label, and each place up to a tenth of a point."""
    drawn, kept = picture(name, scheme).decode(), (FOLDER / f"{name}{scheme}.svg").read_text()
    assert labels(drawn) == labels(kept) != []
    (words, numbers), (kept_words, kept_numbers) = plain(drawn), plain(kept)
    assert words == kept_words and numbers == pytest.approx(kept_numbers, abs=0.1)


def test_no_other_pictures():
    assert {path.name for path in FOLDER.iterdir()} == {
        f"{name}{scheme}.svg" for name in PICTURES for scheme in SCHEMES
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_letters_are_legible(scheme):
    """WCAG's contrast for small text, on the page that the picture is for."""
    for name in PICTURES:
        svg = (FOLDER / f"{name}{scheme}.svg").read_text()
        colours = [re.search(r"fill: (#\w{6})", style)[1] for style in re.findall(r'<text style="([^"]*)"', svg)]
        assert colours and all(contrast(colour, PAGES[scheme]) > 4.5 for colour in colours), name


def contrast(colour: str, other: str) -> float:
    bright, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_both_pictures_are_there(path):
    """Where a document shows one of these pictures, it shows the dark one to readers of a dark page."""
    pairs = re.findall(r'prefers-color-scheme: dark\)" srcset="([^"]+)">\n +<img [^>]*src="([^"]+)"', path.read_text())
    assert len(pairs) == path.read_text().count("pictures/") / 2
    for dark, light in pairs:
        assert dark == light.replace(".svg", "-dark.svg") and (path.parent / light).exists()


@pytest.mark.parametrize("path", sorted(DOCS.glob("report*.md")), ids=lambda path: path.name)
def test_numbers_are_generated(path):
    """Those between the markers, in a translation too, and each number that is computed stands somewhere."""
    text = path.read_text()
    assert with_numbers(text) == text and {name for name, _ in MARKER.findall(text)} == report_numbers().keys()
    assert not re.search(r"^<!--", text, re.M), "Markdown ends the paragraph at a line that begins with a marker"


def test_a_number_between_its_markers():
    assert with_numbers("a <!-- plans -->9<!-- /plans --> b") == "a <!-- plans -->10<!-- /plans --> b"
    with pytest.raises(KeyError):
        with_numbers("<!-- nothing -->9<!-- /nothing -->")


def test_no_other_numbers():
    """Outside the markers stand the story's numbers and the settings of what was measured."""
    text = re.sub(r"\]\([^)]*\)|<[^>]+>", "", MARKER.sub("", TEXT))
    settings = {str(SAMPLES), str(SWEPT["budget_gib"]), str(DEFAULTS["max_seq_len"])}
    assert set(re.findall(r"(?<![\w.=-])\d[\d.,]*(?<![.,])", text)) == STORY | WORDS | settings
    assert set(re.findall(r"r=(\d+)", text)) == {str(DEFAULTS["lora_r"])}


def test_the_message_is_the_logits():
    tokens, entries, nbytes = LOGITS
    assert f"{tokens * entries * nbytes / MIB:.2f} MiB" == "500.00 MiB" and "Tried to allocate 500.00 MiB" in TEXT
    assert read_result("loss_cuda.json")["config"]["vocab_size"] == entries


def test_what_the_text_says_without_a_number():
    step, ladder = read_result("gpu/step.json"), read_result("ladder.json")
    worst = max(gpu_pairs(), key=lambda pair: abs(pair.error))
    assert worst.error < 0 and "at worst" in TEXT and "too low" in TEXT
    kernels: dict[str, dict[str, int]] = {}
    for row in step["rows"]:
        flags = dict(row["flags"])
        if flags["rows"] == 1 and flags["model"] != "mgm-2b" and "failed" not in row:  # MGM-2B has no other trainer
            kind = flags.pop("kind")
            kernels.setdefault(str(flags), {})[kind] = row["activity"]["kernels"]
    assert len(kernels) == 8 and "With one row it starts the fewest kernels" in " ".join(TEXT.split())
    assert all(min(counts, key=counts.get) == OURS and len(counts) > 1 for counts in kernels.values())
    failed = {
        (row["flags"]["model"], row["flags"]["kind"].endswith("Liger")) for row in step["rows"] if "failed" in row
    }
    assert failed == {("qwen3-vl-2b", True)} and "This Liger has no Qwen3-VL" in TEXT
    last = ladder["rungs"][-1]
    assert last["breakdown"]["weights"] > last["peak_allocated_bytes"] / 2 and "most of it" in TEXT


def test_the_parts_are_the_model():
    """Their sizes add up to what full fine-tuning counts; LoRA's part of what is trained is that of docs/lora.md."""
    result = read_result("mgm_2b.json")
    (full,) = (row for row in result["lora"] if row["flags"] == {"lora_r": 0})
    assert sum(result["parts"].values()) == full["total_params"]
    assert f"| 18 layers | | {lora_parameters():,} |" in (DOCS / "lora.md").read_text()


def test_the_cards_are_those_of_the_results():
    """The names of kinds and the text say which GPU it was."""
    for kind, name in GPU_FILES.items():
        assert kind.split()[-1] in read_result(name)["machine"]["gpu"], name
    assert "H200" in read_result("gpu/step.json")["machine"]


def num_pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type ?/Page\b", pdf))


def test_the_pdf_is_the_report():
    """Printed from this text and these pictures: `python -m benchmarks.report --pdf docs/report.pdf`."""
    pdf = PDF.read_bytes()
    assert pdf.endswith(f"% {digest()}\n".encode()), "docs/report.pdf is out of date"
    assert 1 <= num_pages(pdf) <= 2 and len(pdf) < 500_000
    assert b"file://" not in pdf


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium")
def test_the_report_is_printed(tmp_path):
    print_pdf(tmp_path / "report.pdf")
    assert 1 <= num_pages((tmp_path / "report.pdf").read_bytes()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.pdf"]


def test_no_browser(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--pdf: there is no Chromium on this machine"):
        print_pdf(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())
