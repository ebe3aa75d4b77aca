"""Strategies from flags and from launch configs, and what cannot be."""

import json
from pathlib import Path

import pytest

from memory.strategy import Strategy
from utils import UserError


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zero4",), ("--strategy", "zero4", "zero3")),
        (("zero2", "param"), ("--offload param", "zero2", "zero3")),
        (("ddp", "optimizer"), ("--offload optimizer", "ddp")),
        (("fsdp2", "optimizer"), ("--offload optimizer", "FSDP2", "choose param")),
        (("zero3", "nvme"), ("--offload", "nvme", "optimizer")),
        (("single", "none", 2), ("--world_size 2", "ddp")),
        (("ddp", "none", 0), ("--world_size 0", "at least 1")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        Strategy.from_flags(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_strategy_of_each_launch_config() -> None:
    """Name, offload and DeepSpeed's actual values of the configs in accelerate_configs."""
    expected = {"single": "none", "ddp": "none", "zero2": "none", "zero3": "param", "fsdp2": "none"}
    read = {name: Strategy.from_config_file(CONFIGS / f"{name}.yaml") for name in expected}
    assert {s.name: s.offload for s in read.values()} == expected
    assert all(s.world_size == 1 for s in read.values())
    for name in ("zero2", "zero3"):
        assert read[name].deepspeed_config == json.loads((CONFIGS / f"deepspeed_{name}.json").read_text())
    assert read["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert Strategy.from_config_file(CONFIGS / "zero3.yaml", world_size=4).world_size == 4


def test_flags_give_the_launch_configs_strategy() -> None:
    """--strategy zero3 --offload param is zero3.yaml; the other offloads only lack its keys."""
    strategy = Strategy.from_flags("zero3", "param")
    assert strategy.deepspeed_config == Strategy.from_config_file(CONFIGS / "zero3.yaml").deepspeed_config
    zero = Strategy.from_flags("zero3", "optimizer").deepspeed_config["zero_optimization"]
    assert "offload_optimizer" in zero and "offload_param" not in zero
    zero = Strategy.from_flags("zero1").deepspeed_config["zero_optimization"]
    assert zero["stage"] == 1 and not any(key.startswith("offload") for key in zero)
    for offload in ("none", "param"):
        fsdp = Strategy.from_flags("fsdp2", offload).fsdp_config
        assert fsdp["fsdp_offload_params"] == (offload == "param") and fsdp["fsdp_version"] == 2


def test_a_switch_in_quotes(tmp_path: Path) -> None:
    """accelerate's launcher takes the word false for false. So does a prediction."""
    for word, offload in (("'false'", "none"), ("'true'", "param"), ("no", "none")):
        path = tmp_path / "config.yaml"
        path.write_text(f"distributed_type: FSDP\nfsdp_config: {{fsdp_offload_params: {word}}}")
        assert Strategy.from_config_file(path).offload == offload


def test_a_number_that_was_given_wins() -> None:
    with pytest.raises(UserError, match="--world_size 0: it must be at least 1"):
        Strategy.from_config_file(CONFIGS / "ddp.yaml", world_size=0)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("distributed_type: TPU", "TPU is not known"),
        ("no: config", "distributed_type"),
        ("", "no keys"),
        ("a word", "no keys"),
        ("a: b: c", "cannot be read"),
        ("distributed_type: MULTI_GPU\nnum_processes: two", "num_processes is two"),
        ("distributed_type: MULTI_GPU\nnum_processes:", "num_processes is None"),
        ("distributed_type: FSDP\nfsdp_config: [1]", "fsdp_config has no keys"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: maybe}", "fsdp_offload_params is maybe"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: x", "deepspeed_config has no keys"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: README.md}", "cannot be read"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "deepspeed_config_file"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: nowhere.json}", "nowhere.json"),
    ],
)
def test_launch_configs_that_cannot_be_predicted(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as error:
        Strategy.from_config_file(path)
    assert f"--config_file {path}" in str(error.value) and "\n" not in str(error.value)
