"""benchmarks/step.py: all variants take the same steps, and what is measured of them is what it is said to be."""

from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_families
import torch
from torch.autograd import DeviceType
from transformers import GemmaConfig

from benchmarks import speed_tables, step, step_models, step_peers, step_variant
from benchmarks.operations import Operations
from benchmarks.rows import Rows
from benchmarks.step import StepBenchmarkConfig, Team, parse_setting
from benchmarks.step_models import BenchmarkModel, Setting, frozen_matrix_weights, make_batch, write_model
from benchmarks.step_ours import ZERO3, Ours
from benchmarks.step_peers import PEERS, TRAINER, TRL, Peer, check_loss_is_chunked, peers
from benchmarks.step_results import OURS, compare, disagreements, ratios
from benchmarks.step_watch import Step, covered, device_activity
from child_processes import process_pool
from layers.chunked_loss import IGNORE_INDEX
from tests.tiny_families import PROCESSORS
from utils import UserError


SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
RATE = 1e-3  # of learning
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs benchmarks/requirements.txt")


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Tiny models in the benchmark's list, and where each lies."""
    models = {
        "text": BenchmarkModel(lambda: GemmaConfig(**SIZES, **HEADS)),
        "images": BenchmarkModel(tiny_families.qwen3_vl, lambda: PROCESSORS["qwen3_vl"]("qwen3_vl")),
    }
    for name, model in models.items():
        monkeypatch.setitem(step_models.MODELS, name, model)
        write_model(name, str(tmp_path / name), "cpu", torch.float32)
    yield {name: str(tmp_path / name) for name in models}
    frozen_matrix_weights.cache_clear()


def losses(variant: Ours | Peer, name: str, num_tokens: int) -> list[tuple[float, float]]:
    variant.begin(name, make_batch(name, 2, num_tokens, 16))
    steps = variant.run(1) + variant.run(2)
    assert all(each.seconds > 0 for each in steps)
    return [(each.loss, each.grad_norm) for each in steps]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("name", "num_tokens"), [("text", 64), ("images", 128)])
@pytest.mark.parametrize("kind", [TRAINER, pytest.param(TRL, marks=needs_trl)])
def test_our_step_is_the_others(folders, kind, name, num_tokens, gradient_checkpointing):
    """Loss and gradient norm of three updates in two calls; and of another setting, which begins anew."""
    ours = Ours("cpu", folders[name], gradient_checkpointing, RATE)
    peer = Peer(kind, "cpu", folders[name], gradient_checkpointing, RATE)
    found, expected = (losses(variant, name, num_tokens) for variant in (ours, peer))
    assert len(found) == len(expected) == 3 and found[0][0] - found[2][0] > 1e-3, "nothing is learned"
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for variant, before in ((ours, found), (peer, expected)):
        for a, b in zip(losses(variant, name, num_tokens), before, strict=True):
            assert a == pytest.approx(b, rel=1e-5), "it goes on where it was"


@pytest.mark.slow
def test_zero3_takes_the_same_steps(tmp_path):
    """Loss and gradient norm of two updates, under real DeepSpeed and without."""
    write_model("small", str(tmp_path / "small"), "cpu", torch.float32)
    steps = []
    for way in ("", ZERO3):
        with process_pool() as pool:
            pool.submit(step_variant.build, "cpu", str(tmp_path / "small"), OURS, True, way, 1, 32, False).result()
            setting = Setting("small", 1, 32, True, way)
            steps.append(pool.submit(step_variant.begin, "cpu", 0.3, setting).result()["first_steps"])
            assert pool.submit(step_variant.watch_steps).result()["hardware_flops"] > 1e9
    for a, b in zip(*steps, strict=False):  # DeepSpeed's are three
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)


def test_the_batch(folders):
    """The last tokens have labels, none of them an image's."""
    batch = make_batch("images", 2, 128, 20)
    assert batch["input_ids"].shape == (2, 128) and len(batch["image_grid_thw"]) == 2
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [20, 20]
    assert batch["labels"].max() < step_models.NUM_BYTES
    assert (batch["input_ids"][0] != batch["input_ids"][1]).any()


def test_operations_are_those_of_the_formula(folders):
    """4 FLOP for each frozen weight and token, the head for labels alone; LoRA's own; and no gradient goes on from the
    first layer's q, k and v to the frozen embedding. The counter leaves CPU attention out."""
    variant = Ours("cpu", folders["text"], False, RATE)
    variant.begin("text", make_batch("text", 2, 64, 16))
    with Operations() as operations:
        variant.run(1)
    tokens, labels = 2 * 64, 2 * 16
    head = 128 * 512
    matrices = 2 * (128 * 128 * 2 + 128 * 32 * 2 + 3 * 128 * 1024)
    assert frozen_matrix_weights("text") == matrices + head
    lora = 2 * 3 * 2 * tokens * 16 * (3 * 128 + 128 + 32 + 128)  # widths in and out of q, v and o
    first_layer = 2 * tokens * 128 * (128 + 32 + 32) + 2 * 2 * tokens * 16 * 128
    assert operations.total == 4 * (tokens * matrices + labels * head) + lora - first_layer


def test_variants_that_disagree_are_refused():
    """One step of one variant with another gradient norm. The measure is transformers' Trainer, even against ours."""
    steps = {kind: [Step(1.0, 2.0, 0.5), Step(1.0, 1.9, 0.4)] for kind in (OURS, *PEERS)}
    assert disagreements(steps) == {}
    steps[PEERS[3]] = [Step(1.0, 2.0, 0.5), Step(1.0, 1.9, 0.43)]
    assert disagreements(steps) == {PEERS[3]: "disagrees: grad_norm 0.43, Trainer + PEFT's 0.4"}
    steps[TRAINER] = [Step(1.0, float("nan"), 0.5), Step(1.0, 1.9, 0.4)]
    assert OURS in disagreements(steps)


def row(kind: str, checkpointing: bool, speed: float, peak: int, **more: object) -> dict:
    flags = {
        "kind": kind,
        "model": "m",
        "rows": 1,
        "num_tokens": 8,
        "gradient_checkpointing": checkpointing,
        "way": "",
    }
    return {"flags": flags, "tokens_per_second": speed, "peak_bytes": peak} | more


def test_ratios_are_against_the_best_in_the_same_setting():
    """By hand: with checkpointing ours is twice as fast as the fastest and has 0.6 of the smallest's peak."""
    rows = [row(OURS, True, 100, 6), row("a", True, 40, 10), row("b", True, 50, 12), row(OURS, False, 90, 8)]
    rows += [row("a", False, 180, 10), row("b", False, 1, 4) | {"failed": "out of memory"}]
    first, second = ratios(rows)
    assert (first["speed_against_best"], first["peak_against_best"]) == (2, 0.6)
    assert (first["fastest"], first["smallest"]) == ("b", "a")
    assert (second["speed_against_best"], second["peak_against_best"]) == (0.5, 0.8)


def test_the_floor_needs_no_recomputation():
    """A step with checkpointing, and two rows: by what was counted without it in one row."""
    rate = {"matmul_flops_per_second": 10.0}
    rows = [row(OURS, True, 1, 1, hardware_flops=60, **rate), row(OURS, False, 1, 1, hardware_flops=40, **rate)]
    rows += [row(OURS, True, 1, 1, hardware_flops=120, **rate)]
    rows[2]["flags"]["rows"] = 2
    compare({"rows": rows})
    assert [each["floor_seconds"] for each in rows] == [4, 4, 8]


def test_busy_time_counts_overlaps_once():
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    names = {"kernel": (0, 4), "Memcpy DtoH": (2, 6), "Optimizer.step": (0, 100)}
    events = [
        SimpleNamespace(
            name=name,
            device_type=DeviceType.CUDA,
            is_user_annotation=name == "Optimizer.step",
            time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: 1),
        )
        for name, (start, end) in names.items()
    ]
    events.append(SimpleNamespace(device_type=DeviceType.CPU))
    found = device_activity(SimpleNamespace(events=lambda: events))
    assert (found.busy_seconds, found.kernels, found.copies) == (6e-6, 1, 1)


def test_what_can_be_measured_here(monkeypatch):
    """Liger's kernels run on a GPU alone; without TRL there is nothing to compare with."""
    monkeypatch.setattr(step_peers, "find_spec", lambda name: name)
    assert peers("cpu") == (TRAINER, TRL) and peers("cuda") == PEERS
    monkeypatch.setattr(step_peers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trl is missing: pip install -r benchmarks/requirements.txt"):
        peers("cpu")


def test_trl_must_not_make_logits():
    check_loss_is_chunked(None, (), SimpleNamespace(logits=None))
    with pytest.raises(RuntimeError, match="chunked_nll is not on"):
        check_loss_is_chunked(None, (), SimpleNamespace(logits=torch.zeros(1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("small", "write model:ROWSxTOKENS"),
        ("small:1", "write model:ROWSxTOKENS"),
        ("small:0x8", "write model:ROWSxTOKENS"),
        ("smal:1x8", "--settings smal: choose one of small"),
        ("small:1x8:nf4", "nf4 is measured for mgm-2b alone"),
        ("mgm-2b:1x8:zero2", "--settings zero2: choose one of"),
    ],
)
def test_settings_that_do_not_exist(text: str, message: str):
    with pytest.raises(UserError, match=message):
        StepBenchmarkConfig(device="cpu", settings=[text])


def test_settings():
    assert parse_setting("small:4x8") == [Setting("small", 4, 8, mode, "") for mode in (True, False)]
    assert parse_setting("mgm-2b:1x8:zero3") == [Setting("mgm-2b", 1, 8, True, "zero3")]


class Here:
    """A pool whose process is this one."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def submit(self, function, target, *arguments):
        future, steps = Future(), [Step(0.5, 2.0, 1.0), Step(0.5, 2.0, 1.0)]
        found = {
            "build": {},
            "begin": {"first_steps": steps, "peak_bytes": 7},
            "watch_steps": {"hardware_flops": 11, "activity": None},
            "take_turn": {"steps": steps},
        }[target.__name__]
        if self.fail and target.__name__ == "begin":
            found = {"failed": "out of memory"}
        future.set_result(found | {"memory": {"rise_bytes": 0, "peak_reserved_bytes": 5}})
        return future

    def shutdown(self):
        pass


def test_what_fails_is_a_row_and_rows_are_replaced(folders, tmp_path):
    """One variant runs out of memory: the others are measured, and a second call takes the place of the first."""
    config = StepBenchmarkConfig(device="cpu", settings=["text:1x8"], output=str(tmp_path / "step.json"))
    rows = Rows(tmp_path / "step.json", {"version": 2})
    rows.result["rows"] = []
    setting = Setting("text", 1, 8, True, "")
    for fail in (True, False):
        pools = {OURS: Here(), TRAINER: Here(fail)}
        step.measure_team(config, [setting], Team(config, str(tmp_path), setting.team, pools), rows, float("inf"))
        found = rows.result["rows"]
        assert [each["flags"]["kind"] for each in found] == [OURS, TRAINER]
        assert found[1].get("failed") == ("out of memory" if fail else None)
        assert len(found[0]["seconds"]) == 2 * config.rounds and found[0]["tokens_per_second"] == 16
        assert len(rows.result["ratios"]) == (0 if fail else 1)
    step.measure_team(config, [setting], Team(config, str(tmp_path), setting.team, {}), rows, 0.0)
    assert rows.result["rows"] == found, "no time was left"


def test_the_table_says_what_failed(monkeypatch):
    """On a GPU: busy time, kernels, the device's peak; a reason instead of numbers; MGM-2B's floor."""
    numbers = {"median_seconds": 0.25, "model_flops_share_of_rate": 0.5, "hardware_flops_share_of_rate": 0.75}
    numbers |= {"activity": {"busy_seconds": 0.2, "kernels": 321, "copies": 1}, "device_bytes": 2**31}
    numbers |= {"matmul_flops_per_second": 7e14, "num_parameters": 10**9, "floor_seconds": 0.125}
    rows = [row(OURS, True, 100, 2**30, **numbers), row("a", True, 0, 0) | {"failed": "out of memory"}]
    alone = row(OURS, True, 100, 2**30, **numbers)
    alone["flags"] |= {"model": "mgm-2b", "way": "nf4"}
    result = {"machine": "card", "versions": {}, "dtype": "bfloat16", "label_share": 0.3, "device": "cuda"}
    result |= {"rows": [*rows, alone], "ratios": []}
    monkeypatch.setattr(speed_tables, "read_result", lambda name: result)
    text = speed_tables.step_tables("gpu/step.json")
    cells = "250 ms | 100 | 50% | 75% | 1.00 GiB | 200 ms | 321 | 2.00 GiB"
    assert f"| 1 x 8, checkpointing | train.py | {cells} |" in text
    assert "| 1 x 8, checkpointing | a | out of memory |" in text
    assert "| 1 x 8, checkpointing, nf4 | train.py | 250 ms" in text and "| 125 ms |" in text
