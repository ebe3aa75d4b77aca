"""An operator that is repeated returns what it returned before: the same forms, storages and views as without."""

from pathlib import Path

import pytest
import torch

from benchmarks.families import row_config
from memory.partly_fake import PartlyFakeMode
from memory.record import Record
from memory.trace import trace_single


def facts(record: Record) -> list:
    """All allocations. In which order autocast frees the weights that it has cast is left to their addresses."""
    return sorted(
        (n, a.op, a.shape, a.dtype, a.module, a.category, a.phase, a.end is None) for n, a in record.events if n >= 0
    )


@pytest.mark.parametrize(
    "flags",
    [
        {"family": "qwen3_5", "per_device_train_batch_size": 2},
        {"family": "gemma4", "lora_r": 0, "loss": "full", "gradient_checkpointing": False},
        {"family": "llava_next", "eval_samples": 1, "mixed_precision": "bf16", "device": "cuda"},
    ],
    ids=lambda flags: flags["family"],
)
def test_a_step_allocates_the_same(flags: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = row_config(flags, tmp_path)
    repeated = trace_single(config)
    monkeypatch.setattr("memory.repeated.RepeatedOps.key_of", lambda *_: None)
    anew = trace_single(config)
    assert facts(repeated) == facts(anew) and len(facts(anew)) > 1000
    assert repeated.phase_peaks() == anew.phase_peaks() and repeated.breakdown() == anew.breakdown()


def test_what_is_alike_and_what_is_not() -> None:
    """Each call twice, the second time from memory: dtypes follow numbers' types, views their offsets, and what grows
    in place is not taken for what it was."""
    with PartlyFakeMode():
        x = torch.empty(4, 6)
        whole = torch.empty_like(x, dtype=torch.long)
        for _ in range(2):
            assert (whole * 2).dtype == torch.long and (whole * 2.0).dtype == torch.float32
            assert [x[i].storage_offset() for i in (0, 3)] == [0, 18]
            assert x.t().untyped_storage()._cdata == x.untyped_storage()._cdata != (x + 1).untyped_storage()._cdata
            assert x.add_(1) is x and x.t().stride() == (1, 6)
            grown = torch.empty(2)
            assert grown.resize_(5).shape == (5,)
