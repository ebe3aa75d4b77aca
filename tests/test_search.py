"""The search for the fastest step: against all steps there are, with made-up memory and time."""

import itertools
from dataclasses import replace

import pytest

from benchmarks.rows import read_result
from memory.config import ProbeConfig
from memory.margin import device_margin
from planning import search as search_module
from planning import space as space_module
from planning.budget import Budget
from planning.config import PlanConfig
from planning.predictions import Prediction
from planning.search import WORTH, Searcher, search
from planning.space import changed, paths, row_choices, values_of
from utils import GIB, UserError


LAYERS = 18
GB = 10**9


class MadeUp:
    """Predictions by a formula: a row's layers keep an MLP's activations, an attention's, or neither."""

    def __init__(self, mlp_bytes=GB // 20, attention_bytes=GB // 50, mlp_seconds=0.03, attention_seconds=0.01):
        self.mlp, self.attention = (mlp_bytes, mlp_seconds), (attention_bytes, attention_seconds)
        self.asked = 0

    def of(self, configs):
        configs = list(configs)
        self.asked += len(configs)
        return [self.one(config) for config in configs]

    def one(self, config: ProbeConfig) -> Prediction:
        if not config.gradient_checkpointing:
            whole, mlps = 0, 0
        else:
            whole = LAYERS if config.checkpoint_num_layers is None else config.checkpoint_num_layers
            mlps = config.checkpoint_num_mlps
        kept_mlps, kept_attentions = LAYERS - whole - mlps, LAYERS - whole
        rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
        nbytes = 6 * GB + rows * (GB // 10 + kept_mlps * self.mlp[0] + kept_attentions * self.attention[0])
        seconds = 0.2 + rows * (
            2 + (LAYERS - kept_mlps) * self.mlp[1] + (LAYERS - kept_attentions) * self.attention[1]
        )
        host = 2 * GB
        if config.strategy == "zero3":
            nbytes, seconds, host = nbytes - 4 * GB, 3 * seconds, 9 * GB
        if config.quantize == "nf4":
            nbytes -= 3 * GB
        nbytes -= (2048 - config.max_seq_len) * 10**5
        tokens = rows * config.max_seq_len
        return Prediction(config, nbytes, nbytes, host, steps * seconds, tokens / seconds)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(search_module, "num_processes", lambda: 2)


def plan(budget_gib: float, predictions: MadeUp | None = None, **flags):
    config = PlanConfig(plan=True, gpu="h200", budget_gib=budget_gib, **({"gradient_accumulation_steps": 16} | flags))
    budget = Budget.of(config)
    searcher = Searcher(config, budget, predictions or MadeUp())
    return search(searcher), searcher


def all_steps(searcher: Searcher) -> list[Prediction]:
    """Every number of rows with every way to checkpoint."""
    config = searcher.config
    ways = [way for path in paths(config) for way in path]
    configs = [changed(config.probe_config, row | way) for row, way in itertools.product(row_choices(config), ways)]
    return MadeUp.of(searcher.predictions, configs)


@pytest.mark.parametrize("budget_gib", [6, 6.5, 7, 8, 10, 12, 16, 24, 60])
@pytest.mark.parametrize("cheap", ["mlp", "attention"])
def test_as_fast_as_any(budget_gib, cheap):
    """The choice fits, and no other step that fits is faster by more than a search cares for."""
    sizes = {} if cheap == "mlp" else {"mlp_bytes": GB // 10, "mlp_seconds": 0.01, "attention_seconds": 0.03}
    found, searcher = plan(budget_gib, MadeUp(**sizes))
    asked = searcher.predictions.asked
    assert searcher.budget.fits(found.chosen) and found.changes == {}
    best = max(
        (step for step in all_steps(searcher) if searcher.budget.fits(step)), key=lambda step: step.tokens_per_second
    )
    assert found.chosen.tokens_per_second * WORTH**2 >= best.tokens_per_second
    assert asked <= 24


@pytest.mark.parametrize("budget_gib", [5.9, 6, 6.5])
def test_the_rung_above_does_not_fit(budget_gib):
    """Of the chosen number of rows, the next step is known, and too large."""
    found, searcher = plan(budget_gib)
    chosen = found.chosen.config
    for path in paths(searcher.config):
        rungs = [replace(chosen, **way) for way in path]
        above = [b for a, b in itertools.pairwise(rungs) if a == chosen]
        steps = [step for step in searcher.seen if step.config in above]
        assert not any(searcher.budget.fits(step) for step in steps)
        if steps:
            return
    raise AssertionError("the next step was not looked at")


def test_samples_stay():
    found, searcher = plan(24, gradient_accumulation_steps=6, per_device_train_batch_size=2)
    for step in searcher.seen:
        assert step.config.per_device_train_batch_size * step.config.gradient_accumulation_steps == 12
    assert found.chosen.config.per_device_train_batch_size > 2


def test_locks_stay():
    found, searcher = plan(12, lock=["per_device_train_batch_size=2", "gradient_checkpointing=true"])
    assert {step.config.per_device_train_batch_size for step in searcher.seen} == {2}
    assert all(step.config.gradient_checkpointing for step in searcher.seen)
    assert {step.config.checkpoint_num_layers for step in searcher.seen} >= {None, 0}


def test_typed_flags_stay():
    _, searcher = plan(12, checkpoint_num_layers=9)
    assert {step.config.checkpoint_num_layers for step in searcher.seen} == {9}
    assert {step.config.checkpoint_num_mlps for step in searcher.seen} >= {0, 9}
    _, searcher = plan(12, checkpoint_num_mlps=4)
    assert {step.config.checkpoint_num_mlps for step in searcher.seen} == {4}
    assert {step.config.checkpoint_num_layers for step in searcher.seen} >= {0, 14}
    _, searcher = plan(5, strategy="zero3", offload="param")
    assert {step.config.strategy for step in searcher.seen} == {"zero3"}


def test_host_memory_comes_last():
    """ZeRO-3 where nothing else fits, and not where --allow suffices or the host has too little."""
    found, _ = plan(4)
    assert found.chosen.config.strategy == "zero3" and found.changes == {}
    found, _ = plan(4, allow=["quantize"])
    assert found.chosen.config.strategy == "single" and found.changes == {"quantize": "nf4"}
    found, searcher = plan(4, host_gib=8)
    assert found.chosen is None
    assert {step.config.strategy for step in searcher.seen} == {"single", "zero3"}


def test_allowed_changes_come_little_by_little():
    found, searcher = plan(5.75, allow=["length"])
    assert found.changes == {"max_seq_len": 1024}
    assert not any(step.config.quantize == "nf4" for step in searcher.seen)


def test_a_change_that_cannot_be_is_left_out():
    """Later ones do without it."""

    class Gpt2(MadeUp):
        def one(self, config):
            if config.lora_target_modules == ["q_proj", "v_proj"]:
                return Prediction(config, problem="no module of that name")
            return super().one(config)

    found, _ = plan(5.75, Gpt2(), allow=["targets", "length"])
    assert found.changes == {"max_seq_len": 1024}


def test_needless_changes_are_taken_back():
    """Half the length is needed, and half the rank does nothing for it; 4 bits do."""
    found, _ = plan(5.75, allow=["rank", "length"])
    assert found.changes == {"max_seq_len": 1024}
    found, _ = plan(2.85, allow=["quantize", "rank", "length"], lock=["strategy=single"])
    assert found.changes == {"quantize": "nf4", "max_seq_len": 1024}


def test_the_scale_stays_with_another_rank():
    config = ProbeConfig(mode="predict", lora_r=16, lora_alpha=32)
    assert list(values_of(config, "rank")) == [{"lora_r": 8, "lora_alpha": 16}, {"lora_r": 4, "lora_alpha": 8}]
    config = replace(config, use_rslora=True)
    assert list(values_of(config, "rank")) == [{"lora_r": 8}, {"lora_r": 4}]


def test_fewer_targets_are_a_part_of_them():
    config = ProbeConfig(mode="predict")
    for names, found in [
        (["q_proj", "k_proj", "v_proj"], 1),
        (["all-linear"], 1),
        (["k_proj"], 0),
        (["q_proj", "v_proj"], 0),
    ]:
        assert len(list(values_of(replace(config, lora_target_modules=names), "targets"))) == found


def test_more_rows_may_be_slower_at_first():
    """Two rows of a shape that the GPU does not like do not end the search."""

    class Uneven(MadeUp):
        def one(self, config):
            step = super().one(config)
            slow = 1.3 if config.per_device_train_batch_size == 2 else 1
            return replace(
                step, step_seconds=step.step_seconds * slow, tokens_per_second=step.tokens_per_second / slow
            )

    found, searcher = plan(24, Uneven())
    best = max(filter(searcher.budget.fits, all_steps(searcher)), key=lambda step: step.tokens_per_second)
    assert found.chosen.tokens_per_second * WORTH**2 >= best.tokens_per_second
    assert found.chosen.config.per_device_train_batch_size > 2


@pytest.mark.parametrize(
    "flags",
    [{"lock": ["offload=none"]}, {"lock": ["strategy=single"]}, {"config_file": "accelerate_configs/single.yaml"}],
)
def test_a_typed_launch_keeps_zero3_away(flags):
    found, searcher = plan(4, **flags)
    assert found.chosen is None and "zero3" not in {step.config.strategy for step in searcher.seen}


def test_a_router_keeps_its_rows(monkeypatch):
    """Its loss is of a micro-batch."""
    monkeypatch.setattr(space_module, "has_router_loss", lambda config: True)
    _, searcher = plan(60, per_device_train_batch_size=2)
    assert {step.config.per_device_train_batch_size for step in searcher.seen} == {2}


def test_a_model_without_checkpointing(monkeypatch):
    monkeypatch.setattr(space_module, "supports_gradient_checkpointing", lambda model: False)
    found, searcher = plan(24)
    assert found.chosen is not None and not any(step.config.gradient_checkpointing for step in searcher.seen)


def test_updates_of_very_many_samples():
    _, searcher = plan(7, gradient_accumulation_steps=10**9)
    assert len(row_choices(searcher.config)) < 64


def test_what_cannot_be_is_passed_over():
    class Refusing(MadeUp):
        """No MLP runs by itself, and two rows are refused."""

        def one(self, config):
            if config.checkpoint_num_mlps or config.per_device_train_batch_size == 2:
                return Prediction(config, problem="refused")
            return super().one(config)

    found, _ = plan(12, Refusing())
    assert found.chosen is not None and found.chosen.config.checkpoint_num_mlps == 0


def test_a_problem_of_all_steps_is_told():
    class Broken(MadeUp):
        def one(self, config):
            return Prediction(config, problem="--attn_implementation flash_attention_2: not installed")

    with pytest.raises(UserError, match="not installed"):
        plan(12, Broken())


def test_what_is_kept_free_covers_what_was_measured() -> None:
    """On GPUs with room. What the device held of each row is less than a plan would have kept for it."""
    rows = [row for row in read_result("gpu/matrix.json")["rows"] if not row["measured"]["oom"]]
    rows += read_result("gpu/plans.json")["plans"] + read_result("gpu/scaling.json")["rows"]
    for row in rows:
        flags = row["flags"] | row.get("chosen", {})
        strategy = "zero3" if "zero3" in flags.get("config_file", "") else flags.get("strategy", "single")
        margin = device_margin(strategy, flags.get("loss", "chunked"), flags.get("world_size", 1))
        assert row["measured"]["device_bytes"] < row["predicted"]["device_bytes"] * (1 + margin), flags


def test_budget():
    """Each part counts, and the sentence names what is too much."""
    step = Prediction(ProbeConfig(mode="predict"), device_bytes=10 * GIB, host_bytes=4 * GIB)
    budget = Budget(12 * GIB, 0, 0, None, False)
    assert budget.fits(step) and budget.needed_bytes(step) == pytest.approx(10.2 * GIB)
    assert not replace(budget, reserve_bytes=2 * GIB).fits(step)
    assert not replace(budget, card_margin_bytes=2 * GIB).fits(step)
    assert replace(budget, host_bytes=3 * GIB).excess(step) == "1.00 GiB too much for the host"
    assert replace(budget, is_shared=True).excess(step) == "2.20 GiB too much for the device"
