"""The explanation: the logits by hand, and suggestions that save what they say."""

from dataclasses import replace

import pytest

from memory.config import ProbeConfig
from memory.explain import changes_of, explain, logits_lines, suggest
from memory.predict import predict, trace_step
from utils import GIB


def tiny_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "max_seq_len": 96, "lora_r": 4, "mode": "predict"} | flags))


def test_the_logits_by_hand():
    """256 positions x 512 words: 0.25 MiB in bf16 and 0.5 MiB in fp32; no other size is a logits tensor's."""
    config = tiny_config(max_seq_len=256, images_per_sample=0)
    lines = logits_lines(trace_step(config).device, 256, 512)
    assert [line.partition(",")[0] for line in lines] == ["  0.25 MiB in bfloat16", "  0.50 MiB in float32"]


@pytest.mark.slow
def test_suggestions_save_what_they_say():
    """The change that saves most comes first, and saves as much as a prediction with it says."""
    config = tiny_config(gradient_checkpointing=False, per_device_train_batch_size=8, max_seq_len=256)
    device_bytes = predict(config)["device_bytes"]
    suggestions = suggest(config, device_bytes)
    for change in suggestions["changes"]:
        assert change["device_bytes"] == predict(replace(config, **change["flags"]))["device_bytes"]
        assert change["saved_bytes"] == device_bytes - change["device_bytes"] and change["fits"]
    assert suggestions["nearest"] is None
    lines = explain(config, trace_step(config).device, suggestions)
    shown = [line.partition("less with --")[2].split()[0] for line in lines if "less with" in line]
    saving = sorted((c for c in suggestions["changes"] if c["saved_bytes"] > 0), key=lambda c: -c["saved_bytes"])
    assert shown == [next(iter(change["flags"])) for change in saving] != []


def predicted_stand_in(config: ProbeConfig) -> dict:
    """20 GiB, of which checkpointing takes 1, each row 2, a token 1 MiB; ZeRO-3 does not help."""
    rows, length = config.per_device_train_batch_size, config.max_seq_len
    needed = 20 * GIB - config.gradient_checkpointing * GIB + (rows - 8) * 2 * GIB + (length - 256) * 2**20
    return {"device_bytes": needed}


@pytest.mark.parametrize(
    ("budget_gib", "expected"),
    [
        (21, None),  # fits as it is
        (19.5, {"gradient_checkpointing": True}),  # the first that is enough, though others save more
        (13, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (8, {"gradient_checkpointing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (1, None),  # nothing helps
    ],
)
def test_the_nearest_settings_that_fit(monkeypatch, budget_gib, expected):
    """By hand: one change if one is enough, else the changes together in their order, useless ones left out."""
    monkeypatch.setattr("memory.explain.predict", predicted_stand_in)
    config = tiny_config(
        gradient_checkpointing=False, per_device_train_batch_size=8, max_seq_len=256, budget_gib=budget_gib
    )
    nearest = suggest(config, 20 * GIB)["nearest"]
    assert (nearest and nearest["flags"]) == expected
    assert nearest is None or nearest["device_bytes"] <= budget_gib * GIB


def test_what_is_in_order_is_not_suggested():
    """Checkpointing that is on, a batch of one row, a rank above 0, 4-bit weights, sdpa, ZeRO-3: nothing is left to
    change. DoRA with 4-bit weights under ZeRO cannot be, and neither half of it is suggested."""
    config = tiny_config(strategy="zero3", offload="param", images_per_sample=5, quantize="nf4")
    assert list(changes_of(config)) == []
    assert list(changes_of(replace(config, strategy="single", offload="none", use_dora=True))) == []
    assert list(changes_of(replace(config, use_dora=True, quantize="none"))) == []
    mixed = tiny_config(checkpoint_num_layers=1, checkpoint_num_mlps=2)
    assert {"checkpoint_num_layers": 4, "checkpoint_num_mlps": 0} in changes_of(mixed)
    changed = tiny_config(attn_implementation="eager", lora_r=0, gradient_checkpointing=False)
    flags = {name for changes in changes_of(changed) for name in changes}
    assert {"quantize": "nf4"} in changes_of(tiny_config())
    assert {"attn_implementation", "lora_r", "optim", "gradient_checkpointing", "strategy", "max_seq_len"} <= flags
