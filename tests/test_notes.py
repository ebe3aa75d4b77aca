"""A prediction for a GPU names the kernels that the machine lacks, in the result and in what is printed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_families import write_family

from memory.config import ProbeConfig
from memory.notes import allocator_note, offload_note
from memory.probe import probe
from memory.report import report


def predicted(family: str, folder: Path, device: str = "cuda") -> dict:
    """For a card that has been measured, of which there is nothing to note."""
    write_family(family, folder)
    flags = {"images_per_sample": 0, "max_seq_len": 64, "lora_r": 4, "eval_samples": 0, "gpu": "h100"}
    return probe(ProbeConfig(model=str(folder), mode="predict", device=device, mixed_precision="no", **flags))


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_linear_attention_without_its_package(tmp_path: Path) -> None:
    """Qwen3.5's: named twice in a row, although transformers warns once; on a CPU there is no such kernel."""
    for _ in range(2):
        result = predicted("qwen3_5", tmp_path)
        (note,) = [note for note in result["notes"] if note.startswith("flash-linear-attention is not installed here")]
        assert "chunk_gated_delta_rule" in note
    assert f"note: {note}" in report(result)
    assert predicted("qwen3_5", tmp_path, device="cpu")["notes"] == []


def test_experts_are_named_where_there_are_any(tmp_path: Path) -> None:
    assert ["grouped" in note for note in predicted("mixtral", tmp_path / "moe")["notes"]] == [True]
    assert predicted("llama", tmp_path / "dense")["notes"] == []


def test_zero3_is_noted() -> None:
    """What its allocator holds, and that the config file would offload."""
    config = config_of(strategy="zero3")
    assert probe(config)["notes"] == offload_note(config) + allocator_note(config)
    assert probe(config_of(loss="full", device="cpu"))["notes"] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"strategy": "zero3"},
            ["With --strategy zero3 the allocator may hold up to 12% more of the device than this."],
        ),
        (
            {"strategy": "zero3", "world_size": 2},
            ["With --strategy zero3 the allocator may hold up to 14% more of the device than this."],
        ),
        ({"loss": "full"}, ["With --loss full the allocator may hold up to 8% more of the device than this."]),
        ({"strategy": "zero2"}, []),
    ],
    ids=str,
)
def test_an_allocator_that_keeps_more(flags: dict, expected: list[str]) -> None:
    assert allocator_note(config_of(**flags)) == expected


@pytest.mark.parametrize(
    ("flags", "is_noted"),
    [
        ({"strategy": "zero3"}, True),
        ({"strategy": "zero3", "offload": "param"}, False),
        ({"config_file": "accelerate_configs/zero3.yaml"}, False),
        ({"strategy": "zero2"}, False),
    ],
    ids=str,
)
def test_zero3_without_offload(flags: dict, is_noted: bool) -> None:
    """A prediction of the strategy alone says that the config file would also offload."""
    assert bool(offload_note(config_of(**flags))) == is_noted


def config_of(**flags: str | int) -> ProbeConfig:
    return ProbeConfig(**{"model": "tiny", "gpu": "h100", "max_seq_len": 64, "eval_samples": 0} | flags)
