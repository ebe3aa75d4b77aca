"""The explanation: the logits by hand, and suggestions that save what they say."""

from dataclasses import replace

from memory_explain import changes_of, explain, logits_lines
from memory_predict import predict, trace_step
from memory_probe import ProbeConfig
from memory_strategies import strategy_of


def tiny_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "max_seq_len": 96, "lora_r": 4, "mode": "predict"} | flags))


def test_the_logits_by_hand():
    """256 positions x 512 words: 0.25 MiB in bf16 and 0.5 MiB in fp32; no other size is a logits tensor's."""
    config = tiny_config(max_seq_len=256, images_per_sample=0)
    lines = logits_lines(trace_step(config, strategy_of(config)).device, 256, 512)
    assert [line.partition(",")[0] for line in lines] == ["  0.25 MiB in bfloat16", "  0.50 MiB in float32"]


def test_suggestions_save_what_they_say(monkeypatch):
    """A change that is suggested first saves most, and as much as a prediction with it says."""
    config = tiny_config(gradient_checkpointing=False, per_device_train_batch_size=8, max_seq_len=256, strategy="ddp")
    device_bytes = predict(config)["device_bytes"]
    lines = explain(config, device_bytes)
    suggestions = lines[lines.index("What to change first:") + 1 :]
    saved = {
        " ".join(f"--{name} {value}" for name, value in changes.items()): device_bytes
        - predict(replace(config, **changes))["device_bytes"]
        for changes in changes_of(config)
    }
    expected = sorted((flags for flags in saved if saved[flags] > 0), key=lambda flags: -saved[flags])
    assert expected and [line.partition("less with ")[2] for line in suggestions] == expected


def test_what_is_in_order_is_not_suggested():
    """Checkpointing that is on, a batch of one row, a rank above 0, 4-bit weights, sdpa: nothing is left to change.
    What cannot be is not suggested either: DoRA with 4-bit weights under ZeRO."""
    config = tiny_config(strategy="ddp", images_per_sample=5, quantize="nf4")
    assert list(changes_of(config)) == []
    assert list(changes_of(replace(config, strategy="single", use_dora=True))) == []
    assert list(changes_of(replace(config, strategy="zero3", use_dora=True, quantize="none"))) == []
    changed = tiny_config(attn_implementation="eager", lora_r=0, gradient_checkpointing=False)
    flags = {name for changes in changes_of(changed) for name in changes}
    assert {"quantize": "nf4"} in changes_of(tiny_config())
    assert {"attn_implementation", "lora_r", "optim", "gradient_checkpointing", "strategy", "max_seq_len"} <= flags
