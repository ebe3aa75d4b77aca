"""What the README, and the guides that it leads to, say, against the repository."""

import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from peft import PeftModel
from tiny_families import FAMILIES, TIMM_FAMILIES, TRAINED

from benchmarks.tables import DOCUMENTS, with_tables
from convert_mgm import ConvertConfig
from eval import EvalConfig
from memory.config import ProbeConfig
from models.loading import load_processor
from planning.config import PlanConfig
from step import StepConfig, build_model
from train import TrainConfig
from utils import parse_config


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs/gpu_guide.md").read_text()
PAGES = README + GUIDE + "".join((ROOT / name).read_text() for name in ("docs/evaluation.md", "data/README.md"))
SCRIPTS = {
    "train.py": TrainConfig,
    "eval.py": EvalConfig,
    "convert_mgm.py": ConvertConfig,
    "memory_probe.py": PlanConfig,
}


def commands() -> list[list[str]]:
    """Every command line of these pages that starts one of the scripts, as its flags."""
    joined = PAGES.replace("\\\n", " ")
    pattern = rf"(?:^|\s)({'|'.join(map(re.escape, SCRIPTS))})((?: +[^\s`|]+)*)"
    return [[script, *flags.split()] for script, flags in re.findall(pattern, joined) if "--" in flags]


def test_commands_are_found():
    assert {command[0] for command in commands()} == set(SCRIPTS)
    assert len(OWN_DATA) == 3 and "python memory_probe.py --lora-r 16\n" in README
    assert "accelerate launch --config_file accelerate_configs/zero3.yaml train.py\n" in README
    assert "`tensorboard --logdir outputs`" in README


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_flags_exist(command):
    """Every flag in such a command is one of the script's."""
    names = {field.name for field in fields(SCRIPTS[command[0]])} | {"recipe", "help"}
    flags = {word.removeprefix("--").replace("-", "_") for word in command if word.startswith("--")}
    assert flags <= names


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse_config(TrainConfig, ["--recipe", str(recipe)])
    given = yaml.safe_load(recipe.read_text())
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("stage", ["mgm_2b_stage1", "mgm_2b_stage2"])
def test_recipes_of_mgm_2b(stage, monkeypatch, tmp_path):
    """An optimizer step is the given 128 samples, one at a time."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(TrainConfig, ["--recipe", str(ROOT / f"recipes/{stage}.yaml")])
    assert config.gradient_accumulation_steps == 128 and config.per_device_train_batch_size == 1


OWN_DATA = [words for words in commands() if words[0] == "train.py" and "my.json" in words]


@pytest.mark.parametrize("command", OWN_DATA, ids=" ".join)
def test_own_data_line_trains_with_the_defaults(command, monkeypatch, tmp_path):
    """The commands for one's own data have nothing of the demo: what the memory probe assumes."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(TrainConfig, command[1:])
    assert config.per_device_train_batch_size == ProbeConfig.per_device_train_batch_size == 1
    assert config.learning_rate == TrainConfig.learning_rate == 2e-4


def test_tags_are_logged():
    """Every TensorBoard tag that the guide explains is written somewhere in training/."""
    source = "".join(path.read_text() for path in sorted((ROOT / "training").glob("*.py")))
    rows = re.findall(r"^\| `(\w+/\w+)", GUIDE, flags=re.M)
    assert rows
    for tag in rows:
        assert tag in source or tag.partition("/")[2] in source, tag


def test_python_snippets_run(monkeypatch, tmp_path):
    """Each by itself, on the tiny model and an adapter of it in place of MGM-2B's."""
    snippets = [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)```", README, re.M | re.S)]
    assert snippets
    config = StepConfig(model=str(ROOT / "data/tiny_mgm"), mixed_precision="no")
    for trained in (build_model(config, is_deepspeed=False), load_processor(config.model)):
        trained.save_pretrained(tmp_path / "outputs/mine")
    (tmp_path / "mgm-2b").symlink_to(config.model)
    monkeypatch.chdir(tmp_path)
    for code in snippets:
        names: dict[str, Any] = {}
        exec(code, names)
        assert isinstance(names["model"], PeftModel) and names["processor"].tokenizer


def test_tables_are_generated():
    """The tables as `python -m benchmarks.tables` would write them now."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        assert "<!-- " in text and with_tables(text) == text, name


def test_figures_of_the_step():
    """What the text says of speed and memory, against what was measured and predicted."""
    text = " ".join((ROOT / "docs/speed.md").read_text().split())
    ratios = json.loads((ROOT / "results/step.json").read_text())["ratios"]
    by_mode = {ratio["gradient_checkpointing"]: ratio for ratio in ratios}
    for mode, words in ((True, "With checkpointing"), (False, "Without it")):
        speed, peak = (by_mode[mode][f"{name}_against_best"] for name in ("speed", "peak"))
        assert f"{words} a step does {speed:.1f} times the tokens a second of the fastest" in text
        assert f"in {peak:.2f} of the smallest" in text
    on_gpu = json.loads((ROOT / "results/gpu/step.json").read_text())["ratios"]
    text_rows, four_rows, images = (
        [ratio for ratio in on_gpu if (ratio["model"], ratio["rows"]) == key]
        for key in (("gemma-2b", 1), ("gemma-2b", 4), ("qwen3-vl-2b", 1))
    )
    assert f"does {span(text_rows, 'speed')} times the tokens a second of the fastest" in text
    assert f"with one row, and {span(four_rows, 'speed')} times with four rows of 2048 tokens" in text
    assert f"Qwen3-VL-2B does {span(images, 'speed')} times" in text
    assert f"The peak is {span(text_rows, 'peak')} of the smallest other trainer's with one row of text" in text
    assert f"and {span(four_rows, 'peak')} with four rows" in text
    assert f"does {span(text_rows + images, 'speed')} times the tokens" in " ".join(README.split())
    ladder = json.loads((ROOT / "results/ladder.json").read_text())
    (row,) = (row for row in ladder["without"] if row["title"] == "gradient checkpointing")
    recomputes_nothing = "`--no_gradient_checkpointing` recomputes nothing and is faster"
    assert f"{recomputes_nothing}: {row['peak_allocated_bytes'] / 2**30:.1f} GiB" in " ".join(GUIDE.split())


def span(ratios: list[dict[str, Any]], name: str) -> str:
    """The smallest and the largest, or the only one."""
    found = sorted({f"{ratio[f'{name}_against_best']:.2f}" for ratio in ratios})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def test_figures_of_the_prediction():
    """The README's error is that of the device's memory, over the rows of the table that docs/memory.md has."""
    text = " ".join(README.split())
    rows = [
        row
        for row in json.loads((ROOT / "results/gpu/matrix.json").read_text())["rows"]
        if "predicted" in row and not row["measured"].get("oom")
    ]
    errors = [(row["predicted"]["device_bytes"] / row["measured"]["device_bytes"] - 1, row["flags"]) for row in rows]
    worst = min(errors, key=lambda error: error[0])
    assert f"median error is {median(abs(error) for error, _ in errors):.2%}".replace("%", " %") in text
    assert f"over {len(rows)} configurations" in text
    assert worst[1]["loss"] == "full" and f"{-worst[0]:.1%} too low (`--loss full`)".replace("%", " %") in text
    several = json.loads((ROOT / "results/gpu/scaling.json").read_text())["rows"]
    error, row = min(
        (row["predicted"]["device_bytes"] / row["measured"]["device_bytes"] - 1, row["flags"]) for row in several
    )
    assert row["strategy"] == "zero3" and f"up to {-error:.1%} on two GPUs".replace("%", " %") in text
    (defaults,) = (row for row in rows if row["flags"] == {"lora_r": 16, "max_seq_len": 2048})
    assert f"takes {defaults['measured']['device_bytes'] / 2**30:.1f} GiB of an H200" in text


def test_families_of_the_text():
    """Those of which a training step is tested, without those of the table."""
    (said,) = re.findall(r"for (\d+) more a training step is tested", README)
    families = {name for name in FAMILIES if not name.endswith("_untied")}  # which test_family_steps.py adds
    assert int(said) == len(families - {*TRAINED, *TIMM_FAMILIES})


def test_scores_of_the_demo():
    """As `python -m benchmarks.demo` measured them."""
    one, two = json.loads((ROOT / "results/demo.json").read_text())["runs"]
    asked, everything = one["asked"], one["all"]
    text = README.replace("\n  ", " ")
    assert f"answers {asked['exact_match_before']:.0%} of {asked['n']} held-out".replace("%", " %") in text
    assert f"before training and {asked['exact_match']:.0%} after it".replace("%", " %") in text
    assert f"(two processes: {two['asked']['exact_match']:.0%})".replace("%", " %") in text
    assert f"and {everything['exact_match']:.0%} of [all {everything['n']}]".replace("%", " %") in text
