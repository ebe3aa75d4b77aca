"""The cards: what a row may say, how a card is found by what people and PyTorch call it, what its precision is."""

import re
from pathlib import Path

import pytest

from memory.cards import GPUS, RESERVE_GIB, find_gpu, nearest_gpu, this_gpu
from memory.config import ProbeConfig
from memory.gpus import KERNELS, MARGIN_BYTES, MATMUL_SHARE, Gpu
from memory.notes import card_notes
from memory.probe import probe
from memory.report import report
from memory.sweep import run_sweep
from utils import GIB, MIB, UserError


def tiny_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "max_seq_len": 48, "lora_r": 4, "mode": "predict"} | flags))


def nominal_bytes(gpu: Gpu) -> int:
    return int(re.fullmatch(r".+, (\d+) GB", gpu.title)[1]) * GIB


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_capacity_has_a_source(gpu: Gpu) -> None:
    """A message that can be looked up, a measurement, or the nominal size less what a driver keeps. A card never shows
    all of its memory, nor less than nine tenths of it, a sixteenth of which may be ECC's."""
    derived = nominal_bytes(gpu) - int(RESERVE_GIB * GIB)
    is_cited = re.fullmatch(r"[\w.-]+/[\w.-]+ #\d+", gpu.source) is not None
    assert is_cited + gpu.is_measured + (abs(gpu.capacity_bytes - derived) < 2 and not gpu.source) == 1
    assert 0.9 * nominal_bytes(gpu) < gpu.capacity_bytes < nominal_bytes(gpu)


def test_keys_are_names() -> None:
    """Each of them the title's name, with the size where there are several; both lead to the card and to no other."""
    names = [gpu.name for gpu in GPUS.values()]
    for key, gpu in GPUS.items():
        name, size = gpu.title.lower().replace(" ", "").split(",")
        assert key == name or (key == f"{name}-{size}" and names.count(gpu.name) > 1)
        assert find_gpu(key) == find_gpu(gpu.title) == key
    assert {"rtx3060", "rtx3070", "rtxa4000", "rtx3090", "rtx4090", "h100", "h200"} <= GPUS.keys()


@pytest.mark.parametrize(
    "order",
    [
        "rtx3050-6gb rtx3050 rtx3060 rtx3060ti rtx3070 rtx3080 rtx3080-12gb rtx3090",
        "rtx4060 rtx4060ti rtx4070 rtx4070tisuper rtx4080 rtx4090",
        "rtx5060 rtx5060ti rtx5070 rtx5070ti rtx5080 rtx5090",
        "rtxa4000 rtxa5000 rtxa6000",
        "t4 a10 a100 h100",
        "jetsonorinnano jetsonagxorin",
    ],
)
def test_larger_numbers_are_faster(order: str) -> None:
    """In products of both kinds. A GeForce multiplies in 16 bits twice as fast as in 32, the others four times and
    more: their tensor cores add up in fp32 at the full rate."""
    cards = [GPUS[key] for key in order.split()]
    for name in ("matmul_flops", "fp32_flops"):
        rates = [getattr(gpu.speed, name) for gpu in cards]
        assert name == "fp32_flops" and "a100" in order or rates == sorted(rates)
    for gpu in cards:
        ratio = gpu.speed.matmul_flops / gpu.speed.fp32_flops
        is_geforce = re.match(r"RTX \d", gpu.title)
        assert ratio == pytest.approx(2, rel=0.01) if is_geforce else ratio > 3.9


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_rates_are_of_this_world(gpu: Gpu) -> None:
    """A multiprocessor does 64 or 128 products in fp32 a tick, at 0.9 to 2.7 GHz. PCIe is the slowest way."""
    products = 64 if gpu.family.capability in ((7, 0), (7, 5), (8, 0)) else 128
    flops = gpu.speed.fp32_flops / MATMUL_SHARE
    assert 0.9e9 < flops / (2 * products * gpu.speed.num_multiprocessors) < 2.7e9
    assert gpu.speed.pcie_bytes_per_second < gpu.speed.memory_bytes_per_second


def test_margins() -> None:
    """None where it was measured; else the spread of the contexts and of the drivers' shares, by hand."""
    assert {key for key, gpu in GPUS.items() if not gpu.margin_bytes} == {"h100", "h200"}
    assert pytest.approx(270.8125 * MIB + 0.15 * GIB, abs=MIB) == MARGIN_BYTES
    assert GPUS["t4"].margin_bytes == GPUS["rtx3060"].margin_bytes == MARGIN_BYTES


@pytest.mark.parametrize(
    ("key", "in_use_gib", "allocated_gib", "unallocated_mib"),
    [
        ("rtx4060", 7.46, 7.13, 222.83),  # ESRSchao/EdgeRegNet #2
        ("rtxa4000", 15.51, 15.01, 301.92),  # DengKaiCQ/VGGT-Long #6
        ("rtx3070", 7.39, 7.21, 5.22),  # meta-llama/codellama #82
        ("rtx3090", 7.46, 7.13, 87.15),  # Stable-X/StableNormal #33
        ("rtx4090", 22.69, 21.72, 520.54),  # pinokiofactory/flux-webui #11
        ("rtx5090", 31.34, 30.74, 19.41),  # Wan-Video/Wan2.1 #465
        ("t4", 14.53, 14.42, 8.63),  # mbzuai-oryx/GeoPixel #5
        ("t4", 10.40, 10.23, 44.39),  # QwenLM/Qwen3-VL #1046
        ("l4", 20.78, 18.66, 1.89 * 1024),  # ArcInstitute/evo2 #190
        ("a100", 14.25, 12.87, 912.01),  # TianheWu/CoSeR #10
    ],
)
def test_processes_of_others_had_no_more(
    key: str, in_use_gib: float, allocated_gib: float, unallocated_mib: float
) -> None:
    """Beyond PyTorch's reserve, by its messages: "this process has ... memory in use. Of the allocated memory ... is
    allocated by PyTorch, and ... is reserved by PyTorch but unallocated"."""
    besides_bytes = (in_use_gib - allocated_gib) * GIB - unallocated_mib * MIB
    assert 0 < besides_bytes < GPUS[key].family.context_bytes + KERNELS


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX 4090, 24 GB", "rtx4090"),
        ("RTX 4060 Ti", "rtx4060ti"),
        ("4060ti 16gb", "rtx4060ti-16gb"),
        ("rtx4060ti16", "rtx4060ti-16gb"),
        ("RTX 4060 Ti, 8 GB", "rtx4060ti"),
        ("RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("rtx3080_12", "rtx3080-12gb"),
        ("A4000", "rtxa4000"),
        ("A100-80GB", "a100-80gb"),
        ("Tesla T4", "t4"),
        ("Jetson AGX Orin", "jetsonagxorin"),
    ],
)
def test_what_people_type(name: str, key: str) -> None:
    assert find_gpu(name) == ProbeConfig(model="tiny", mode="predict", gpu=name).gpu == key


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rtx4070ti", "did you mean"),
        ("RTX 4070 Ti", "rtx4070"),
        ("rtx9090", "rtx4090"),
        ("orin", "docs/gpus.md"),
        ("", ""),
    ],
)
def test_what_no_card_is_called(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        find_gpu(name)
    assert str(error.value).startswith(f"--gpu {name}: choose a card of docs/gpus.md, or give --budget_gib")
    assert hint in str(error.value)


ADA, AMPERE_CARD = (8, 9), (8, 6)


@pytest.mark.parametrize(
    ("name", "capability", "total_gib", "key"),
    [
        ("NVIDIA GeForce RTX 4090", ADA, 23.5, "rtx4090"),
        ("NVIDIA GeForce RTX 4060", ADA, 7.6, "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", ADA, 7.6, "rtx4060ti"),
        ("NVIDIA GeForce RTX 4060 Ti", ADA, 15.6, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", ADA, 15.6, "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 4070 SUPER", ADA, 11.6, "rtx4070"),
        ("NVIDIA GeForce RTX 3080", AMPERE_CARD, 9.6, "rtx3080"),
        ("NVIDIA GeForce RTX 3080 Ti", AMPERE_CARD, 11.6, "rtx3080-12gb"),
        ("NVIDIA GeForce RTX 3050", AMPERE_CARD, 5.7, "rtx3050-6gb"),
        ("NVIDIA GeForce RTX 5060 Ti", (12, 0), 15.5, "rtx5060ti"),
        ("NVIDIA RTX A4000", AMPERE_CARD, 15.6, "rtxa4000"),
        ("NVIDIA A10", AMPERE_CARD, 22.0, "a10"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.2, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.5, "a100"),
        ("NVIDIA A100-PCIE-40GB", (8, 0), 39.4, "a100"),
        ("NVIDIA A100 80GB PCIe", (8, 0), 79.2, "a100-80gb"),
        ("Tesla T4", (7, 5), 14.6, "t4"),
        ("Tesla V100-SXM2-16GB", (7, 0), 15.8, "v100"),
        ("Tesla V100-PCIE-32GB", (7, 0), 31.7, "v100-32gb"),
        ("NVIDIA L4", ADA, 22.0, "l4"),
        ("NVIDIA L40S", ADA, 44.4, "l40s"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.2, "h100"),
        ("NVIDIA H200", (9, 0), 139.8, "h200"),
        ("Orin", (8, 7), 61.4, "jetsonagxorin"),
        ("Orin", (8, 7), 7.4, "jetsonorinnano"),
        # Not in the table: of the same generation, with about as much memory.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ADA, 15.7, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", AMPERE_CARD, 5.8, "rtx3050-6gb"),
        ("NVIDIA A10G", AMPERE_CARD, 22.1, "a10"),
        ("NVIDIA RTX 6000 Ada Generation", ADA, 47.4, "l40s"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 10.6, "t4"),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), 10.9, "v100"),
        ("NVIDIA B200", (10, 0), 178.4, "h200"),
        ("NVIDIA GB10", (12, 1), 119.7, "rtx5090"),
    ],
)
def test_what_pytorch_calls_them(name: str, capability: tuple[int, int], total_gib: float, key: str) -> None:
    found = nearest_gpu(name, capability, int(total_gib * GIB))
    assert found == key
    assert GPUS[found].has_bf16 == (capability >= (8, 0))


def test_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name, the compute capability and the memory that PyTorch reports."""

    class Properties:
        name, major, minor, total_memory = "NVIDIA A100-SXM4-80GB", 8, 0, 79 * GIB

    monkeypatch.setattr("torch.cuda.get_device_properties", Properties)
    assert this_gpu() == "a100-80gb"


@pytest.mark.parametrize(
    ("gpu", "given", "expected"),
    [
        ("t4", "auto", "fp16"),
        ("v100", "auto", "fp16"),
        ("rtx3060", "auto", "bf16"),
        ("t4", "no", "no"),
        ("h100", "fp16", "fp16"),
    ],
)
def test_the_precision_is_the_cards(gpu: str, given: str, expected: str) -> None:
    assert tiny_config(gpu=gpu, mixed_precision=given).mixed_precision == expected


def test_bf16_without_its_units() -> None:
    with pytest.raises(UserError, match="^--mixed_precision bf16: T4 has no bf16 units, choose fp16$"):
        tiny_config(gpu="t4", mixed_precision="bf16")


def test_a_sweep_of_cards(tmp_path: Path) -> None:
    """Each row has its card's precision, whatever the default card's is."""
    rows = run_sweep(tiny_config(sweep=["gpu=t4,RTX 3060"], output=str(tmp_path)))["rows"]
    configs = [(row["config"]["gpu"], row["config"]["mixed_precision"]) for row in rows]
    assert configs == [("t4", "fp16"), ("rtx3060", "bf16")]


def test_notes_of_a_card() -> None:
    """A prediction says that nobody has measured its card, by how much it may be off, and what a Jetson shares."""
    assert card_notes(GPUS["h100"], GIB, GIB) == []
    result = probe(tiny_config(gpu="jetsonorinnano"))
    unmeasured, shared = result["notes"]
    assert "on this card (Jetson Orin Nano): up to 0.41 GiB may differ" in unmeasured
    assert f"together need {(result['device_bytes'] + result['host_bytes']) / GIB:.2f} GiB" in shared
    assert all(f"  note: {note}" in report(result).splitlines() for note in result["notes"])
    assert result["fits"] == (result["device_bytes"] <= GPUS["jetsonorinnano"].capacity_bytes)
    assert probe(tiny_config(device="cpu"))["notes"] == probe(tiny_config(gpu="h200"))["notes"] == []


def test_the_help_names_cards_that_exist() -> None:
    text = ProbeConfig.__dataclass_fields__["gpu"].metadata["help"]
    named = re.findall(r"\b(?:rtx|[ahltv])\w*\d[\w-]*", text)
    assert len(named) > 5 and set(named) <= GPUS.keys()
