"""The prediction against the real allocator on the CPU, against sums worked out by hand, and its parts one by one."""

import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from memory.allocator import replay_events
from memory.config import ProbeConfig
from memory.measure_cpu import measure_cpu, measure_single
from memory.record import Record
from memory.trace import trace_single
from utils import UserError


TINY_LORA = {"q_proj": 128 + 128, "v_proj": 128 + 32, "o_proj": 128 + 128}  # inputs + outputs, for each unit of rank


def tiny_config(device: str = "cpu", **flags: object) -> ProbeConfig:
    defaults = {"model": "tiny", "mixed_precision": "no", "max_seq_len": 48, "lora_r": 8}
    return ProbeConfig(mode="predict", device=device, **(defaults | flags))


@functools.cache
def traced(device: str, **flags: object) -> Record:
    """The record of a tiny run with one image a row. Tests only read it, so that they can share it."""
    return trace_single(tiny_config(device, **flags))


def started(record: Record, **attributes: object) -> list:
    """The allocations of a record whose attributes have these values."""
    allocations = [allocation for nbytes, allocation in record.events if nbytes > 0]
    return [a for a in allocations if all(getattr(a, key) == value for key, value in attributes.items())]


def test_prediction_is_what_the_allocator_does() -> None:
    """LoRA, checkpointing, sdpa, two rows with an image each: within 0.01 % of the profiler's memory events."""
    config = tiny_config(per_device_train_batch_size=2)
    measured_bytes = measure_single(config)
    assert trace_single(config).peak_bytes == pytest.approx(measured_bytes, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "flags"),
    [
        (0, {"gradient_checkpointing": False, "per_device_train_batch_size": 3}),
        (2, {"attn_implementation": "eager", "max_seq_len": 100}),
        (1, {"lora_r": 0, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
        (1, {"lora_r": 0, "gradient_checkpointing": False, "attn_implementation": "eager", "max_seq_len": 300}),
        (1, {"gradient_checkpointing": False, "max_seq_len": 400, "lora_dropout": 0.0}),
        (1, {"lora_target_modules": ["all-linear"], "use_dora": True, "use_rslora": True}),
        (1, {"quantize": "nf4", "lora_target_modules": ["all-linear"], "gradient_checkpointing": False}),
        (0, {"quantize": "nf4", "use_dora": True, "max_seq_len": 300}),
        (1, {"packing": True, "max_seq_len": 100}),
        (0, {"packing": True, "per_device_train_batch_size": 2, "attn_implementation": "eager"}),
        (1, {"packing": True, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "max_seq_len": 200}),
    ],
)
def test_prediction_of_every_kind_of_run(images: int, flags: dict) -> None:
    """With and without images, eager, full fine-tuning, accumulation, DoRA, 4-bit weights, packing: within 0.02 % of a
    fresh process."""
    config = tiny_config(images_per_sample=images, **flags)
    measured_bytes = measure_cpu(config, config.launch)
    assert trace_single(config).peak_bytes == pytest.approx(measured_bytes, rel=2e-4)


def test_breakdown_adds_up_and_holds_what_is_known() -> None:
    """By hand, in bytes of fp32: trained = 4 layers x LoRA of rank 8 + projector and mining; AdamW keeps two moments
    of it and a step count of 4 bytes a tensor; the categories add up to the peak."""
    record = traced("cpu")
    lora = 4 * 8 * sum(TINY_LORA.values())
    projector = 64 * 128 + 128 + 128 * 128 + 128
    mining = (2 * 64 + 64 * 64 + 64) + 2 * (2 * 208 + 208 * 64 + 64)
    breakdown = record.breakdown()
    assert breakdown["trained"] == 4 * (lora + projector + mining)
    num_tensors = 4 * 3 * 2 + 4 + 3 * 4
    assert breakdown["optimizer"] == 2 * breakdown["trained"] + 4 * num_tensors
    assert sum(breakdown.values()) == record.peak_bytes == max(record.phase_peaks().values())
    assert sum(tensor.nbytes for tensor in record.largest_at_peak(10**6)) == record.peak_bytes


def test_gradients_and_state_are_found() -> None:
    """Full fine-tuning: the gradients of each of two updates are as many bytes as the trained parameters; the peak of
    the step is all that is trained four times, weights and batch, and what a CPU's AdamW needs for one tensor."""
    record = traced("cpu", lora_r=0)
    sums = {
        category: sum(a.nbytes for a in started(record, category=category))
        for category in ("trained", "weights", "gradients", "optimizer", "batch")
    }
    assert sums["gradients"] == 2 * sums["trained"]
    resident = 2 * sums["trained"] + sums["weights"] + sums["optimizer"] + sums["batch"]
    assert resident < record.phase_peaks()["step"] < resident + 4 * 512 * 128 * 4  # the largest is the embedding


def test_the_optimizers_temporaries() -> None:
    """A CPU's are of the size of one tensor. A GPU has none, but in fp16 those of everything that is trained."""
    temporary_bytes = {}
    for device_type, precision in (("cpu", "no"), ("cuda", "bf16"), ("cuda", "fp16")):
        record = traced(device_type, lora_r=0, mixed_precision=precision)
        trained = sum(a.nbytes for a in started(record, category="trained"))
        in_step = [a.phase == "step" and a.category == "temporaries" for _, a in record.events]
        sizes = [nbytes for (nbytes, _), counts in zip(record.events, in_step, strict=True) if counts]
        temporary_bytes[precision] = max(itertools.accumulate(sizes))
    assert temporary_bytes["bf16"] < 0.2 * trained
    assert temporary_bytes["no"] < 0.5 * trained <= trained <= temporary_bytes["fp16"]


def test_backward_and_recomputation_are_attributed_to_modules() -> None:
    """A weight's gradient comes from that weight's module, and a recomputed activation from the recomputed one."""
    record = traced("cpu", lora_r=0, loss="full")
    gradients = {a.module for a in started(record, category="gradients")}
    # Embedding and head are one parameter: the head's share is there first, the embedding makes the sum.
    assert {"model.language_model.embed_tokens", "model.language_model.layers.2.mlp.down_proj"} <= gradients
    assert started(record, phase="backward", op="aten.mm.default", module="lm_head", shape=(512, 128))
    recomputed = started(record, phase="backward", op="aten.gelu.default")
    assert {f"model.language_model.layers.{i}.mlp.act_fn" for i in range(4)} <= {a.module for a in recomputed}
    assert all(a.category == "activations" for a in recomputed)


def test_a_mask_is_made_only_where_rows_are_padded() -> None:
    """One row needs no mask, whatever fake tensors look like to transformers; of two the shorter one is padded."""
    for rows in (1, 2):
        record = traced("cpu", per_device_train_batch_size=rows)
        masks = [a for a in started(record, dtype="bool") if a.shape[-2:] == (48, 48)]
        assert bool(masks) == (rows == 2)


def test_accumulated_gradients_wait_during_forward() -> None:
    """With accumulation the gradients are there in the next forward pass, without they are not."""
    in_use = []
    for steps in (1, 2):
        record = traced("cpu", lora_r=0, gradient_accumulation_steps=steps)
        in_use.append(record.phase_peaks()["forward"])
    trained = sum(a.nbytes for a in started(record, category="trained"))
    assert in_use[1] - in_use[0] == trained


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [("bf16", 1, "flash"), ("bf16", 2, "flash"), ("no", 2, "efficient"), ("no", 1, "bmm")],
)
def test_attention_kernel_of_cuda(dtype: str, rows: int, expected: str) -> None:
    """Flash in 16 bits, where no batch has a mask. In fp32 memory-efficient with one; without one transformers leaves
    the shared keys to the kernel, of which only the step-by-step attention takes them."""
    record = traced("cuda", mixed_precision=dtype, per_device_train_batch_size=rows)
    attention = [a for a in started(record, phase="backward") if a.module.endswith("self_attn")]
    assert any(expected in a.op for a in attention)
    assert not any("for_cpu" in a.op for a in started(record))


def test_fp16_takes_as_much_as_bf16() -> None:
    """Both are two bytes; the fake run must not ask for the GPU that fp16 training needs. Its loss scaler keeps the
    optimizer's counters on the host."""
    peaks = [
        max(bytes for phase, bytes in traced("cuda", mixed_precision=name).phase_peaks().items() if phase != "step")
        for name in ("fp16", "bf16")
    ]
    assert abs(peaks[0] / peaks[1] - 1) < 0.005


def test_folder_is_not_read_for_weights(tmp_path: Path) -> None:
    """A folder with config and processor, and no weights, gives the prediction."""
    shutil.copytree("data/tiny_mgm", tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    assert trace_single(tiny_config(model=str(tmp_path))).peak_bytes > 2**20


def test_the_callers_accelerator_is_left_alone() -> None:
    """Accelerate's state is shared by all accelerators of a process: a trace in another precision lets it be."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=7)
    trace_single(tiny_config("cuda", mixed_precision="bf16"))
    assert accelerator.mixed_precision == AcceleratorState().mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 7
    AcceleratorState._reset_state(reset_partial_state=True)


def test_images_must_fit_the_row() -> None:
    """The tiny model's image takes 16 positions: three fit 48, four do not."""
    trace_single(tiny_config(images_per_sample=3))
    with pytest.raises(UserError, match="4 images take 64 positions, but max_seq_len is 48"):
        trace_single(tiny_config(images_per_sample=4))


def test_replay_of_a_trace() -> None:
    """The allocator's peak is the trace's, rounded up: at most 512 bytes a tensor more, and 1 MiB a large block."""
    record = traced("cuda", mixed_precision="bf16")
    replay = replay_events(record.events)
    num_alive = len(record.alive_at(record.peak_index))
    assert record.peak_bytes <= replay.peak_allocated_bytes < record.peak_bytes + 512 * num_alive + 8 * 2**20
    assert replay.peak_reserved_bytes >= replay.peak_allocated_bytes


def test_4_bit_layers_make_their_weights_anew() -> None:
    """Each of 28 layers makes its weight in the backward pass, as bitsandbytes' own code does it on fake tensors; none
    of them lives on, so that the largest is all that is there of them at a time. Two updates are traced."""
    record = traced("cuda", quantize="nf4", mixed_precision="bf16", mlp_tiles=1)
    made = started(record, op="bitsandbytes.dequantize_4bit.default", phase="backward")
    assert len(made) == 2 * 28 and {a.dtype for a in made} == {"bfloat16"}
    edges = sorted((i, n) for a in made for i, n in ((a.start, a.nbytes), (a.end, -a.nbytes)))
    assert max(itertools.accumulate(n for _, n in edges)) == max(a.nbytes for a in made)


@pytest.mark.slow
def test_mgm_2b_in_4_bits() -> None:
    """By hand: 1,981,808,640 weights in the language model's layers, half a byte each, a byte for 64 and 4 bytes for
    16,384 of them; two tables of 64 and 1024 bytes for each of 126 layers; the rest of MGM-2B in bf16."""
    config = ProbeConfig(model="mgm-2b", mode="predict", quantize="nf4")
    packed = 18 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 16384)
    expected = packed // 2 + packed // 64 + 4 * packed // 64 // 256 + 126 * (64 + 1024)
    expected += 2 * (3_019_166_144 - packed)
    assert trace_single(config).breakdown()["weights"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_mgm_2b() -> None:
    """MGM-2B, LoRA r=16 in bf16, 2048 tokens. By hand: the 3,019,166,144 parameters in bf16; in fp32 3,022,848 of
    LoRA, 13,259,008 of projector and mining; the loss's backward has 2048 x 256,000 logits three times in fp32.
    Without them the step takes half."""
    config = ProbeConfig(model="mgm-2b", mode="predict", loss="full")
    record = trace_single(config)
    breakdown = record.breakdown()
    assert breakdown["trained"] == pytest.approx(4 * (3_022_848 + 13_259_008), rel=1e-4)  # blocks of 512 bytes
    assert breakdown["weights"] == pytest.approx(2 * 3_019_166_144, rel=1e-3)  # and a few buffers
    assert breakdown["loss"] == pytest.approx(3 * 4 * 2048 * 256_000, rel=1e-4)
    assert trace_single(replace(config, loss="chunked")).peak_bytes < 6.5 * 2**30 < record.peak_bytes / 1.5
