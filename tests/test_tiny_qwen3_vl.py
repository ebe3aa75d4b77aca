"""The committed tiny Qwen3-VL: the demo on a second family."""

from pathlib import Path

import pytest
import torch
from forked_runs import Run
from transformers import Qwen3VLForConditionalGeneration

from data.make_tiny_mgm import place_accuracy
from models.loading import load_model, load_processor


TINY_QWEN3_VL = Path(__file__).parent.parent / "data/tiny_qwen3_vl"


def test_it_is_small_and_loads() -> None:
    assert sum(path.stat().st_size for path in TINY_QWEN3_VL.iterdir()) <= 6_000_000
    model = load_model(str(TINY_QWEN3_VL), torch.float32, "sdpa")
    assert type(model) is Qwen3VLForConditionalGeneration
    assert load_processor(str(TINY_QWEN3_VL)).image_token_id == model.config.image_token_id


def test_it_knows_digits_by_their_place() -> None:
    """On 20 images of held-out scans; over 200 images its training ended at 93 %."""
    model = load_model(str(TINY_QWEN3_VL), torch.float32, "sdpa").eval()
    assert place_accuracy(model, load_processor(str(TINY_QWEN3_VL)), num_images=20) > 0.8


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    """The demo with its recipe, all 594 updates: few held-out questions are answered exactly before, 80 % after."""
    ended = Run(f"--model {TINY_QWEN3_VL} --output_dir {tmp_path / 'out'}", tmp_path / "logs").wait(timeout=900)
    assert ended.code == 0, ended.err[-3000:]
    scores = ended.result["eval"]
    assert scores["exact_match_before"] < 0.2 and scores["exact_match"] >= 0.8
