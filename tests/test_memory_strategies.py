"""Strategies against sums worked out by hand, against each other, and against real DeepSpeed and DDP on the CPU."""

import functools
import json
import os
import socket
from pathlib import Path

import pytest
import torch

import step
from memory.config import ProbeConfig
from memory.ddp import DDP_BUCKET_BYTES, ddp_bucket_sizes, with_ddp_buckets
from memory.host import host_breakdown, pinned_blocks_bytes
from memory.launch import launched
from memory.measure_cpu import measure_cpu, measure_rank
from memory.measure_gpu import measure_this_process
from memory.placed import PlacedRecord
from memory.predict import trace_strategy
from memory.record import Allocation, Record
from memory.strategy import Strategy
from step import build_model
from utils import ALLOCATOR_VARIABLE, UserError


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
MIB = 2**20


def tiny_config(**flags: object) -> ProbeConfig:
    defaults = {"model": "tiny", "mixed_precision": "no", "max_seq_len": 48, "lora_r": 8}
    return ProbeConfig(mode="predict", **(defaults | flags))


def small_buckets(strategy: Strategy) -> Strategy:
    """The strategy with sizes that suit the tiny model: its weights are gathered and its buckets do not cover all."""
    if not strategy.name.startswith("zero"):
        return strategy
    strategy.deepspeed_config["zero_optimization"] |= {
        "reduce_bucket_size": 50_000,
        "allgather_bucket_size": 50_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_max_live_parameters": 200_000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_param_persistence_threshold": 1_000,
        "sub_group_size": 100_000,
    }
    return strategy


@functools.cache
def traced(name: str, offload: str = "none", world_size: int = 1, lora_r: int = 8) -> PlacedRecord:
    """The trace of a tiny run on GPUs. Tests only read it, so that they can share it."""
    strategy = small_buckets(Strategy.from_flags(name, offload, world_size))
    return trace_strategy(tiny_config(lora_r=lora_r), strategy)


def parameter_bytes(lora_r: int = 8) -> dict[bool, int]:
    """Bytes of the tiny model's trained (True) and frozen (False) parameters in fp32."""
    with torch.device("meta"):
        model = build_model(tiny_config(lora_r=lora_r), is_deepspeed=True)
    sums = {True: 0, False: 0}
    for parameter in model.parameters():
        sums[parameter.requires_grad] += parameter.numel() * 4
    return sums


def host_bytes(trace: PlacedRecord) -> int:
    return trace.pinned.peak_bytes + trace.host.peak_bytes


def record_of(*sizes: int) -> Record:
    """A record from bytes: positive ones allocate, negative ones release the last allocation of that size."""
    record, live = Record(), {}
    for nbytes in sizes:
        if nbytes > 0:
            live[nbytes] = Allocation(nbytes, (nbytes,), "uint8", "", "", "load", len(record.events))
        record.events.append((nbytes, live[abs(nbytes)]))
        if nbytes < 0:
            live[-nbytes].end = len(record.events) - 1
    return record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zero4",), ("--strategy", "zero4", "zero3")),
        (("zero2", "param"), ("--offload param", "zero2", "zero3")),
        (("ddp", "optimizer"), ("--offload optimizer", "ddp")),
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
    read = {name: Strategy.from_config_file(CONFIGS / f"{name}.yaml") for name in ("single", "ddp", "zero2", "zero3")}
    expected = {"single": "none", "ddp": "none", "zero2": "none", "zero3": "param"}
    assert {s.name: s.offload for s in read.values()} == expected
    assert all(s.world_size == 1 for s in read.values())
    for name in ("zero2", "zero3"):
        assert read[name].deepspeed_config == json.loads((CONFIGS / f"deepspeed_{name}.json").read_text())
    assert Strategy.from_config_file(CONFIGS / "zero3.yaml", world_size=4).world_size == 4


def test_flags_give_the_launch_configs_strategy() -> None:
    """--strategy zero3 --offload param is zero3.yaml; the other offloads only lack its keys."""
    strategy = Strategy.from_flags("zero3", "param")
    assert strategy.deepspeed_config == Strategy.from_config_file(CONFIGS / "zero3.yaml").deepspeed_config
    zero = Strategy.from_flags("zero3", "optimizer").deepspeed_config["zero_optimization"]
    assert "offload_optimizer" in zero and "offload_param" not in zero
    zero = Strategy.from_flags("zero1").deepspeed_config["zero_optimization"]
    assert zero["stage"] == 1 and not any(key.startswith("offload") for key in zero)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("distributed_type: FSDP", "FSDP"),
        ("no: config", "distributed_type"),
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


def test_ddp_buckets_by_hand() -> None:
    """From the last parameter on: 0.75 + 0.5 MiB pass 1 MiB, 10 + 16 MiB pass 25 MiB, what is left is the last one."""
    sizes = [nbytes * MIB // 4 for nbytes in (4, 64, 40, 2, 3)]
    assert ddp_bucket_sizes(sizes) == [5 * MIB // 4, 26 * MIB, MIB]
    assert ddp_bucket_sizes([]) == []


def test_ddp_buckets_are_torchs() -> None:
    """torch assigns parameters to buckets in the order it is given; DDP reverses its result."""
    parameters = [torch.empty(size) for size in (300_000, 7_000_000, 1, 200_000, 9_000_000, 400_000, 10_000)]
    limits = [MIB, DDP_BUCKET_BYTES]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(parameters[::-1], limits)
    expected = [sum(parameters[::-1][i].nbytes for i in bucket) for bucket in indices]
    assert ddp_bucket_sizes([parameter.nbytes for parameter in parameters]) == expected


def test_ddp_adds_the_trained_parameters_once_more() -> None:
    """Every gradient is there by itself and in a bucket; the rest is a single process's."""
    single, ddp = traced("single").device, traced("ddp").device
    assert ddp.peak_bytes - single.peak_bytes == parameter_bytes()[True]
    assert ddp.breakdown()["communication"] == parameter_bytes()[True]
    for nbytes, allocation in ddp.events:
        at = allocation.start if nbytes > 0 else allocation.end
        assert nbytes == 0 or ddp.events[at] == (nbytes, allocation)


def test_ddp_leaves_the_given_record_alone() -> None:
    record = traced("single").device
    before = [(nbytes, a.start, a.end) for nbytes, a in record.events]
    with_ddp_buckets(record)
    assert [(nbytes, a.start, a.end) for nbytes, a in record.events] == before


@pytest.mark.slow
def test_offload_moves_bytes_from_the_device_to_the_host() -> None:
    """Each step of offload takes from the device and gives to the host; frozen weights have no masters anywhere."""
    traces = [traced("zero3", offload) for offload in ("none", "optimizer", "param")]
    device = [trace.device.peak_bytes for trace in traces]
    assert device[0] > device[1] > device[2]
    assert traces[0].pinned.events == []
    assert host_bytes(traces[1]) < host_bytes(traces[2])
    # The persistent device share of the weights goes down by what the host gains.
    assert traces[2].pinned.breakdown()["weights"] > parameter_bytes()[False] * 0.9


@pytest.mark.slow
def test_optimizer_has_masters_and_states_of_the_trained_only() -> None:
    """Offloaded: fp32 masters and two Adam moments of 4 bytes for each trained parameter, and gradients twice (the
    partitions' buffer and the masters'), whatever is frozen."""
    trace = traced("zero3", "param")
    trained_bytes = parameter_bytes()[True]
    assert trace.host.breakdown()["optimizer"] == pytest.approx(3 * trained_bytes, rel=0.01)
    assert trace.pinned.breakdown()["gradients"] == pytest.approx(2 * trained_bytes, rel=0.01)


@pytest.mark.slow
def test_processes_share_what_stage_3_splits() -> None:
    """Two processes keep half of the weights and of the optimizer's memory each."""
    one, two = traced("zero3", "param"), traced("zero3", "param", 2)
    assert two.pinned.peak_bytes == pytest.approx(one.pinned.peak_bytes / 2, rel=0.02)
    assert two.host.breakdown()["optimizer"] == pytest.approx(one.host.breakdown()["optimizer"] / 2, rel=0.02)


@pytest.mark.slow
def test_a_tied_heads_block_is_kept() -> None:
    """The head is page-locked beside the embedding that it will be tied to; only the embedding's part stays."""
    record = traced("zero3", "param").pinned
    embedding = max(allocation.nbytes for nbytes, allocation in record.events if allocation.category == "weights")
    copies = [allocation for nbytes, allocation in record.events if nbytes == embedding]
    assert [allocation.end is None for allocation in copies] == [True, False]


def test_pinned_blocks_by_hand() -> None:
    """3 -> 4 MiB, 5 -> 8 MiB, the released 4 MiB block serves the 4 MiB, 2 -> 2 MiB: 14 MiB, of which 11 are used."""
    record = record_of(3 * MIB, 5 * MIB, -3 * MIB, 4 * MIB, 2 * MIB)
    assert pinned_blocks_bytes(record) == 14 * MIB
    assert pinned_blocks_bytes(record_of(MIB + 1)) == 2 * MIB
    assert pinned_blocks_bytes(Record()) == 0


@pytest.mark.slow
def test_host_breakdown_counts_processes_and_workers() -> None:
    """Twice the processes, twice all; a worker more costs its memory and its batches; all parts are positive."""
    trace = traced("zero3", "param")
    one = host_breakdown(trace, num_workers=1)
    assert host_breakdown(trace, num_workers=1, world_size=2) == {key: 2 * nbytes for key, nbytes in one.items()}
    assert min(one.values()) > 0 and {"weights", "optimizer", "workers", "batches", "process"} <= one.keys()
    more = host_breakdown(trace, num_workers=3)
    assert {key for key in one if more[key] != one[key]} == {"workers", "batches"}
    assert sum(one.values()) >= pinned_blocks_bytes(trace.pinned) + trace.host.peak_bytes


class Built(Exception):
    """The accelerator would be built now."""


@pytest.mark.parametrize(
    "measure_here",
    [
        measure_rank,
        measure_this_process,
    ],
    ids=["strategy", "gpu"],
)
def test_a_measurement_runs_two_micro_batches_an_update(measure_here, monkeypatch) -> None:
    """Of the 128 that a recipe accumulates, as a prediction does: the others find the same memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    for name in ("RANK", "LOCAL_RANK", ALLOCATOR_VARIABLE):  # what is measured in a process of its own sets them
        monkeypatch.setenv(name, "0")

    def build(mixed_precision: str, micro_batch_size: int, gradient_accumulation_steps: int, *_: object) -> None:
        raise Built(gradient_accumulation_steps)

    monkeypatch.setattr(step, "build_accelerator", build)
    for given, expected in ((1, 1), (2, 2), (128, 2)):
        config = tiny_config(gradient_accumulation_steps=given)
        with pytest.raises(Built, match=f"^{expected}$"):
            measure_here(config)
        assert config.gradient_accumulation_steps == given, "the flags are the caller's"


def test_every_launch_takes_a_free_port() -> None:
    """Two at once differ, and nothing listens there."""
    ports = []
    for _ in range(2):
        with launched({}):
            ports.append(int(os.environ["MASTER_PORT"]))
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", ports[-1]))
    assert ports[0] != ports[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "offload", "world_size", "flags"),
    [
        ("zero3", "param", 1, {}),
        ("zero2", "none", 1, {"lora_r": 0}),
        ("ddp", "none", 2, {}),
        ("zero3", "param", 1, {"quantize": "nf4", "mlp_tiles": 1}),
    ],
)
def test_prediction_of_a_real_run(name: str, offload: str, world_size: int, flags: dict) -> None:
    """Device and host bytes together, within 0.1 % of what the same steps allocate under real DeepSpeed or DDP on the
    CPU."""
    strategy, config = (
        small_buckets(Strategy.from_flags(name, offload, world_size)),
        tiny_config(device="cpu", **flags),
    )
    predicted_bytes = trace_strategy(config, strategy).device.peak_bytes
    for attempt in range(3):  # on a busy machine single measurements came out up to a tenth lower
        measured_bytes = measure_cpu(config, strategy)
        if attempt == 2 or predicted_bytes == pytest.approx(measured_bytes, rel=1e-3):
            break
    assert predicted_bytes == pytest.approx(measured_bytes, rel=1e-3)
