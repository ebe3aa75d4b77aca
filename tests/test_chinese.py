"""The Chinese documents say what the English ones say: each NAME.zh-CN.md against NAME.md, section by section.

Words cannot be compared, but headings, code blocks, tables, links, `code` and numbers can. A section that changes in
one language alone is named, with what the other one lacks.
"""

import calendar
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
CHINESE = sorted(
    path.relative_to(ROOT) for folder in (".", "docs", "data") for path in (ROOT / folder).glob("*.zh-CN.md")
)
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", re.ASCII)  # not those of names: H200
MILLION = re.compile(r"(\d+(?:\.\d+)?) million")  # 1.2 million are 120 万
MONTH = re.compile(rf"(?<=\d )({'|'.join(calendar.month_name[1:])})(?= \d{{4}})")  # 5 May 2026 is 2026 年 5 月 5 日
LINK = re.compile(r"\]\(([^)\s]+)\)|<(https?://[^>]+)>|(?:src|srcset|href)=\"([^\"]+)\"")
CODE = re.compile(r"`[^`]+`")
MARKER = re.compile(r"<!-- (.+?)(?: zh)? -->")  # around a table or a number that is generated
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass
class Section:
    """What can be compared: the text's parts, and their order where it counts."""

    level: int
    heading: str
    code_lines: list[str] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # of tables
    text: str = ""


def sections(text: str) -> list[Section]:
    """A document's sections; the first has what stands above all headings."""
    found, is_fenced = [Section(0, "")], False
    for line in text.splitlines():
        here = found[-1]
        if is_fence := line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        if is_fence or is_fenced or line.startswith("    "):
            here.code_lines.append(line)
        elif heading := re.fullmatch(r"(#+) (.+)", line):
            found.append(Section(len(heading[1]), heading[2], text=heading[2] + "\n"))
        elif marker := MARKER.fullmatch(line):
            here.markers.append(marker[1])
        elif line.startswith("|"):
            here.rows.append(line)
        else:
            here.text += line + "\n"
    return found


def anchors(path: Path) -> list[str]:
    """A document's headings as GitHub makes anchors of them, in order."""
    return [re.sub(r"[^\w\- ]", "", each.heading.lower()).replace(" ", "-") for each in sections(path.read_text())[1:]]


def target(link: str, path: Path) -> str:
    """Where a link leads, the same for both languages: the English file, and the number of the heading in it."""
    if ":" in link:
        return link
    name, _, anchor = link.partition("#")
    file = (path.parent / name).resolve() if name else path
    place = str(file.relative_to(ROOT)).replace(".zh-CN.md", ".md")
    return f"{place}#{anchors(file).index(anchor)}" if anchor else place


def items(text: str, path: Path) -> Counter[str]:
    """The links, the `code`, the markers and the numbers of a text, each as often as it stands there."""
    links = [target("".join(groups), path) for groups in LINK.findall(text)]
    text = LINK.sub("] ", " ".join(text.split()))
    text = MILLION.sub(lambda count: f"{float(count[1]) * 100:g} 万", text)
    text = MONTH.sub(lambda month: str(list(calendar.month_name).index(month[0])), text)
    markers, text = MARKER.findall(text), MARKER.sub("", text)
    return Counter([*links, *markers, *CODE.findall(text), *NUMBER.findall(CODE.sub(" ", text))])


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def differences(english: Path, chinese: Path, text: str | None = None) -> list[str]:
    """What the two documents do not have in common, a line each. `text` stands for that of the English one."""
    pairs = list(zip_longest(sections(text or english.read_text()), sections(chinese.read_text())))
    levels = [[each and each.level for each in pair] for pair in pairs]
    for (first, second), (ours, theirs) in zip(pairs, levels, strict=True):
        if ours != theirs:
            return [f"headings differ from here on: {first and first.heading!r}, {second and second.heading!r}"]
    found = []
    for first, second in pairs:
        for name in ("code_lines", "markers"):
            if getattr(first, name) != getattr(second, name):
                found.append(f"{first.heading}: {name} {getattr(first, name)}, {getattr(second, name)}")
        for ours, theirs in zip_longest(first.rows, second.rows, fillvalue=""):
            if cells(ours) != cells(theirs) or items(ours, english) != items(theirs, chinese):
                found.append(f"{first.heading}: row {ours!r}, {theirs!r}")
        ours, theirs = items(first.text, english), items(second.text, chinese)
        if ours != theirs:
            found.append(f"{first.heading}: lacks {dict(ours - theirs)}, has too much {dict(theirs - ours)}")
    return found


def english_of(chinese: Path) -> Path:
    return ROOT / str(chinese).replace(".zh-CN.md", ".md")


def test_documents_are_found():
    names = "evaluation gpu_guide gpus host_memory interview lora memory planner report scaling speed tour".split()
    paths = {f"docs/{name}.zh-CN.md" for name in [*names, "lora_vs_full", "reliability", "troubleshooting"]}
    paths |= {"README.zh-CN.md", "data/README.zh-CN.md"}
    assert paths <= {str(path) for path in CHINESE}


@pytest.mark.parametrize("path", CHINESE, ids=str)
def test_chinese_says_what_english_says(path):
    assert not differences(english_of(path), ROOT / path)


@pytest.mark.parametrize("path", CHINESE, ids=str)
def test_paragraphs_are_chinese(path):
    """A sentence that was only copied would satisfy the comparison."""
    texts = [each.text for each in sections((ROOT / path).read_text())]
    paragraphs = [part.strip() for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]
    assert [part for part in paragraphs if not HAN.search(part)] == [f"[English]({english_of(path).name})"]


@pytest.mark.parametrize("path", CHINESE, ids=str)
def test_languages_link_to_each_other(path):
    """At the top; and a Chinese page leads to Chinese pages where they exist."""
    assert f"\n[中文]({path.name})\n" in english_of(path).read_text()[:200]
    text = (ROOT / path).read_text()
    for link in re.findall(r"\]\(([^)#:\s]+\.md)", text.replace(f"[English]({english_of(path).name})", "")):
        translated = ((ROOT / path).parent / link.replace(".md", ".zh-CN.md")).resolve()
        assert link.endswith(".zh-CN.md") or not translated.exists(), link


CHANGES = {
    "a heading": (r"\Z", "\n## More\n"),
    "a heading's level": (r"\n## ", "\n### "),
    "a command": (r"\n    python ", "\n    python -u "),
    "a command in the text": (r"\n\n(?=[A-Z])", "\n\n`tensorboard` "),
    "a number": (r"\d\.\d GiB", "0.5 GiB"),
    "a number more": (r"\n\n(?=[A-Z])", "\n\n90 "),
    "a row": (r"\n(\| .+)", r"\n\1\n\1"),
    "a number in a table": (r"(\n\|.+) \d\.\d GiB", r"\1 0.5 GiB"),
    "a link": (r"\n\n(?=[A-Z])", "\n\n[License](LICENSE) "),
    "a link's heading": (r"\]\(#[\w-]+", "](#read-on"),
}


@pytest.mark.parametrize("old, new", CHANGES.values(), ids=CHANGES)
def test_a_change_in_english_alone_is_found(old, new):
    """A README that differs from ours in one place is not what the Chinese one says."""
    text = (ROOT / "README.md").read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text and differences(ROOT / "README.md", ROOT / "README.zh-CN.md", changed)
