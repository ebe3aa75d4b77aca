"""FSDP2 traced: against real FSDP2 on the CPU, and what it splits, gathers and offloads."""

from dataclasses import replace

import pytest
import torch
from tiny_records import parameter_bytes, tiny_config, traced
from torch.testing._internal.distributed.fake_pg import FakeStore

from memory.config import ProbeConfig
from memory.fsdp2 import trace_fsdp2
from memory.launch import in_fresh_process, launched
from memory.measure_cpu import measure_rank
from memory.predict import last_rank
from memory.record import Record
from memory.strategy import Strategy


def measure_alone(config: ProbeConfig, world_size: int) -> int:
    """The peak of one of several processes that does not wait for the others: gloo's threads would free what they have
    sent when they get to it."""
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    return measure_rank(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, {}),
        (4, {"gradient_checkpointing": False}),
        (2, {"lora_r": 0, "gradient_accumulation_steps": 2}),
    ],
)
def test_prediction_of_a_real_run(world_size: int, flags: dict) -> None:
    """Within 0.01 % of what real tensors take on the CPU."""
    strategy, config = Strategy.from_flags("fsdp2", world_size=world_size), tiny_config(device="cpu", **flags)
    with launched(strategy):
        measured_bytes = in_fresh_process(measure_alone, config, world_size)
    predicted_bytes = trace_fsdp2(config, strategy).device.peak_bytes
    assert predicted_bytes == pytest.approx(measured_bytes, rel=1e-4)


@pytest.mark.slow
def test_processes_share_what_is_split() -> None:
    """Weights, what is trained and its optimizer state; a layer that runs is whole, twice while it is gathered."""
    one, two = (traced("fsdp2", world_size=n).device for n in (1, 2))
    for category, share in (("trained", parameter_bytes()[True]), ("optimizer", 2 * parameter_bytes()[True])):
        kept = [record_end_bytes(record, category) for record in (one, two)]
        assert kept[0] == pytest.approx(share, rel=0.05) and kept[1] == pytest.approx(share / 2, rel=0.1)
    assert two.breakdown()["communication"] > 0 and one.phase_peaks()["load"] > two.phase_peaks()["load"]


def record_end_bytes(record: Record, category: str) -> int:
    """What is never freed of a category."""
    return sum(a.nbytes for nbytes, a in record.events if nbytes > 0 and a.end is None and a.category == category)


@pytest.mark.slow
def test_offload_moves_parts_to_the_host() -> None:
    """The parts are pinned, the optimizer's state is in ordinary memory, and the device has what is gathered."""
    kept, offloaded = traced("fsdp2", world_size=2), traced("fsdp2", "param", 2)
    assert kept.pinned.events == []
    pinned = offloaded.pinned.breakdown()
    assert pinned["weights"] + pinned["trained"] > 0.25 * sum(parameter_bytes().values())
    assert offloaded.host.breakdown()["optimizer"] == pytest.approx(parameter_bytes()[True], rel=0.1)
    assert offloaded.device.peak_bytes < kept.device.peak_bytes - parameter_bytes()[False] / 4


@pytest.mark.slow
def test_the_last_process_has_the_smaller_part() -> None:
    """Three processes share tensors whose rows are no multiple of three."""
    config = tiny_config(strategy="fsdp2", world_size=3)
    first = traced("fsdp2", world_size=3)
    last = last_rank(first, config)["peak_allocated_bytes"]
    assert 0.9 * first.device.peak_bytes < last < first.device.peak_bytes
    ddp = traced("ddp", world_size=3)
    assert last_rank(ddp, tiny_config(strategy="ddp", world_size=3))["peak_allocated_bytes"] == ddp.device.peak_bytes


@pytest.mark.slow
def test_streams() -> None:
    """What is gathered is allocated on streams of its own, as on a GPU: their memory is not reused by others."""
    events = traced("fsdp2", world_size=2).device.events
    gathered = {a.stream for nbytes, a in events if nbytes > 0 and a.category == "communication"}
    assert len(gathered) >= 2
    assert {a.stream for nbytes, a in events if a.category == "activations"} == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "settings"),
    [({"optim": "sgd"}, {}), ({}, {"fsdp_cpu_ram_efficient_loading": True})],
)
def test_what_a_run_may_ask_for(flags: dict, settings: dict) -> None:
    """SGD, which FSDP2 has no kernel for over all parameters, and weights that one process hands out."""
    usual = Strategy.from_flags("fsdp2", world_size=2)
    strategy = replace(usual, fsdp_config=usual.fsdp_config | settings)
    record = trace_fsdp2(tiny_config(**flags), strategy).device
    has_moments = record.breakdown().get("optimizer", 0) > 0
    assert has_moments == ("optim" not in flags)
