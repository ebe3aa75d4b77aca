"""What docs/ says, against the repository: links, commands, tables, quoted messages."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.tables import DOCUMENTS, with_tables
from convert_mgm import ConvertConfig
from data.check import CheckConfig
from eval import EvalConfig
from planning.config import PlanConfig
from train import TrainConfig
from utils import flag_parser


ROOT = Path(__file__).parent.parent
DOCS = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = {"train.py": TrainConfig, "eval.py": EvalConfig, "memory_probe.py": PlanConfig}
SCRIPTS |= {"convert_mgm.py": ConvertConfig, "data.check": CheckConfig}
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")


def anchors(path: Path) -> set[str]:
    """The headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_are_found():
    assert {"lora.md", "troubleshooting.md", "host_memory.md", "gpu_guide.md"} <= {path.name for path in DOCS}


def test_every_file_is_on_the_layout_page():
    """docs/layout.md links to each Python file of the root and of the folders, by the name that it shows."""
    links = re.findall(r"^\| \[([\w/]+\.py)\]\(\.\./([\w/]+\.py)\)", (ROOT / "docs/layout.md").read_text(), flags=re.M)
    assert all(f"/{path}".endswith(f"/{name}") for name, path in links)
    listed = [path for _, path in links]
    folders = ("layers", "chat", "mgm", "models", "data", "memory", "planning", "evaluation", "training", "conversion")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert sorted(listed) == sorted(str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links(path):
    """Every file that is linked to exists, and every heading that is pointed at."""
    for name, anchor in LINK.findall(path.read_text()):
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {name}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {name}#{anchor}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_flags_exist(path):
    """Every flag after a script's name is one of the script's; so is every flag in the text one of some script's."""
    text = path.read_text().replace("\\\n", " ")
    every = {f.name for config in SCRIPTS.values() for f in fields(config)}
    every |= {f"no_{name}" for name in every}
    for script, words in re.findall(rf"({'|'.join(map(re.escape, SCRIPTS))})((?: +[^\s`|]+)*)", text):
        names = {f.name for f in fields(SCRIPTS[script])} | {"recipe", "help"}
        names |= {f"no_{name}" for name in names}
        flags = {word[2:].replace("-", "_") for word in words.split() if re.fullmatch(r"--[\w-]+", word)}
        assert flags <= names, (path.name, script, flags - names)
    quoted = re.findall(r"`--(\w+)(?: [^`]*)?`", text)
    assert set(quoted) <= every | FOREIGN_FLAGS, set(quoted) - every


# Docker's, lmms-eval's, benchmarks/step.py's, accelerate's and torchrun's, every script's
FOREIGN_FLAGS = {"shm", "model_args", "tasks", "size", "num_processes", "recipe", "rdzv_conf", "machine_rank"}
FOREIGN_FLAGS |= {"deepspeed_multinode_launcher"}


@pytest.mark.parametrize("config", SCRIPTS.values(), ids=SCRIPTS)
def test_help_explains_every_flag(config):
    """By one name, with a text of its own, and without a default of None beside it."""
    text = flag_parser(config).format_help()
    for name in (f.name for f in fields(config)):
        assert re.search(rf"^  --{name}\b.*(\s{{3,}}\S|\n {{10,}}\S)", text, re.M), name
        assert "_" not in name or f"--{name.replace('_', '-')}" not in text
    assert "(default: None)" not in text and "usage" not in text


@pytest.mark.parametrize("name", ["lora.md", "lora.zh-CN.md", "host_memory.md", "host_memory.zh-CN.md"])
def test_tables_are_generated(name):
    """The tables as `python -m benchmarks.tables` would write them now."""
    text = (ROOT / "docs" / name).read_text()
    assert f"docs/{name}" in DOCUMENTS and "<!-- /" in text and with_tables(text) == text


def test_quoted_settings_are_those_of_the_files():
    """What troubleshooting says that this project sets."""
    config = (ROOT / "accelerate_configs/deepspeed_zero3.json").read_text()
    assert '"zero_force_ds_cpu_optimizer": false' in config and '"pin_memory": true' in config
    assert TrainConfig.attn_implementation == "sdpa" and TrainConfig.mixed_precision == "auto"
    assert (TrainConfig.lora_r, TrainConfig.lora_alpha, TrainConfig.lora_dropout) == (16, 32, 0.1)


def test_host_memory_verdict():
    """docs/host_memory.md: full fine-tuning with offload against 64 GB and LoRA."""
    rows = json.loads((ROOT / "results/mgm_2b.json").read_text())["host"]
    full, lora = (sum(row["host"].values()) for row in (rows[2], rows[0]))
    assert rows[2]["flags"]["lora_r"] == 0 and "lora_r" not in rows[0]["flags"]
    assert full > 64 * 2**30 and lora < full / 7


def test_lora_arithmetic():
    """docs/lora.md's count by hand, against the sum it names and MGM-2B's sizes."""
    text = (ROOT / "docs/lora.md").read_text()
    by_hand = [16 * (2048 + out) for out in (2048, 256, 2048)]
    assert all(f"{count:,}" in text for count in [*by_hand, sum(by_hand), 18 * sum(by_hand)])
