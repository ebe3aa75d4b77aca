"""memory_probe.py --plan: its flags, its predictions, what it writes."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

import memory_probe
from data.demo import ensure_demo
from memory.config import ProbeConfig
from planning import predictions as predictions_module
from planning.budget import Budget
from planning.config import PlanConfig
from planning.dataset import with_images_of_dataset
from planning.epoch import epoch_of
from planning.front import Front
from planning.predictions import Prediction, Predictions, cache_folder, key_of
from planning.recipe import launch_command, recipe_text
from planning.report import epoch_lines
from step import StepConfig
from training.config import TrainConfig
from utils import UserError, parse_config


ROOT = Path(__file__).parents[1]
TINY = ["--model", "tiny", "--max_seq_len", "128", "--gpu", "h200"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(**flags) -> PlanConfig:
    return PlanConfig(**({"plan": True, "model": "tiny", "max_seq_len": 128, "gpu": "h200"} | flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mode": "measure"}, "--mode measure: a plan predicts"),
        ({"device": "cpu"}, "--device cpu: a plan is for a GPU"),
        ({"sweep": ["lora_r=8,16"]}, "--sweep: not with --plan"),
        ({"explain": True}, "--explain: not with --plan"),
        ({"lock": ["rank=8"]}, "--lock rank=8"),
        ({"lock": ["lora_r=8,16"]}, "--lock lora_r=8,16: give it one value"),
        ({"lock": ["lora_r=8", "lora-r=16"]}, "--lock lora_r=8: lora_r is locked twice"),
        ({"lora_r": 32, "lock": ["lora_r=8"]}, "--lock lora_r=8: --lora_r 32 is typed too"),
        ({"world_size": 2}, "--world_size 2: single is one process, choose --strategy ddp"),
        ({"lock": ["lora_r=-1"]}, "--lora_r -1"),
        ({"lock": ["gpu=h100"]}, "--lock gpu=h100: a plan does not change it"),
        ({"allow": ["speed"]}, "--allow speed: choose of quantize"),
        ({"allow": ["length"], "lock": ["max_seq_len=128"]}, "--allow length: --lock keeps max_seq_len"),
        ({"allow": ["rank"], "lora_r": 0}, "--allow rank: --lora_r 0 trains no adapter"),
        ({"reserve_gib": -1.0}, "--reserve_gib -1.0"),
        ({"host_gib": 0.0}, "--host_gib 0.0: it must be above 0"),
        ({"image_folder": "images"}, "--image_folder: it is that of --dataset"),
        ({"strategy": "zero1"}, "--strategy zero1 --offload none: accelerate_configs has no file for it"),
        ({"strategy": "zero3"}, "--strategy zero3 --offload none: accelerate_configs has no file for it"),
        ({"plan": False, "lock": ["lora_r=8"]}, "--lock: it belongs to --plan"),
        ({"plan": False, "reserve_gib": 1.0}, "--reserve_gib: it belongs to --plan"),
        ({"plan": False, "dataset": "my.json"}, "--dataset: it belongs to --plan"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=f"^{message}"):
        config(**flags)


def test_a_list_given_twice_is_an_error():
    """The second would replace the first without a word."""
    with pytest.raises(UserError, match="--lock: given twice"):
        parse_config(PlanConfig, ["--plan", "--lock", "lora_r=8", "--lock", "max_seq_len=64"])


def test_a_plan_predicts_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert config().mode == "predict" and config().device == "cuda"


def test_locked_flags_are_taken():
    planned = config(lock=["gradient_accumulation_steps=128", "lora_target_modules=q_proj+v_proj"])
    assert planned.gradient_accumulation_steps == 128 and planned.lora_target_modules == ["q_proj", "v_proj"]
    assert planned.stays("gradient_accumulation_steps") and not planned.stays("per_device_train_batch_size")


@pytest.mark.parametrize(
    "flags", [{"world_size": 2, "strategy": "ddp"}, {"lock": ["world_size=2"], "strategy": "ddp"}], ids=str
)
def test_several_processes(flags):
    planned = config(**flags)
    assert planned.launch.name == "ddp" and planned.world_size == 2 and not planned.keeps_strategy
    assert "ddp.yaml --num_processes 2 train.py" in launch_command(planned, Prediction(planned.probe_config), None)


# Recipes


def test_the_recipe_gives_the_same_step(tmp_path):
    """train.py reads it, and what it does not write cannot be another default."""
    planned = config(gradient_accumulation_steps=8, lora_r=4, seed=7, packing=True)
    chosen = Prediction(replace(planned.probe_config, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    recipe = tmp_path / "chosen.yaml"
    recipe.write_text(recipe_text(planned, chosen, recipe))
    trained = parse_config(TrainConfig, ["--recipe", str(recipe)])
    differing = [
        each.name for each in fields(StepConfig) if getattr(trained, each.name) != getattr(chosen.config, each.name)
    ]
    assert differing == []
    assert f"single.yaml train.py --recipe {recipe}" in recipe.read_text()
    assert "tiny is a preset" in recipe.read_text()


@pytest.mark.parametrize("dataset", [None, "my data.json"])
def test_the_flags_give_the_same_step(dataset):
    """Also where train.py would add the demo's recipe."""
    planned = config(quantize="nf4", lora_target_modules=["q_proj", "k_proj"], gradient_checkpointing=False)
    planned.dataset = dataset
    words = shlex.split(launch_command(planned, Prediction(planned.probe_config), None))
    trained = parse_config(TrainConfig, words[words.index("train.py") + 1 :])
    assert trained.step_flags == {each.name: getattr(planned, each.name) for each in fields(StepConfig)}
    assert trained.dataset == dataset


def test_a_file_of_ones_own_is_launched(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text((ROOT / "accelerate_configs/zero3.yaml").read_text())
    planned = config(config_file=str(own))
    assert planned.stays("strategy")
    assert f"--config_file {own} --num_processes 1 train.py" in launch_command(
        planned, Prediction(planned.probe_config), None
    )


# Predictions


def steps(planned: PlanConfig) -> list[ProbeConfig]:
    return [replace(planned.probe_config, lora_r=rank) for rank in (4, 8)]


def test_predictions_are_kept(tmp_path):
    told = []
    with Predictions(lambda step, is_known: told.append(is_known), tmp_path) as predictions:
        first = predictions.of([*steps(config()), config().probe_config, config().probe_config])
    assert told == [False, False, False]
    with Predictions(lambda step, is_known: told.append(is_known), tmp_path) as predictions:
        again = predictions.of(steps(config()))
        assert not predictions._pools
    assert again == first[:2] and told[3:] == [True, True]
    assert first[0].device_bytes > 0 and first[0].step_seconds > 0
    assert first[2] == first[3]


def test_a_kept_file_that_is_cut_short_is_made_anew(tmp_path):
    planned = config().probe_config
    (tmp_path / f"{key_of(planned)}.json").write_text('{"device_b')
    with Predictions(lambda *_: None, tmp_path) as predictions:
        assert predictions.of([planned])[0].device_bytes > 0


def test_a_refused_step_has_its_problem(tmp_path):
    planned = replace(config().probe_config, images_per_sample=60)
    with Predictions(lambda *_: None, tmp_path) as predictions:
        (step,) = predictions.of([planned])
    assert step.problem and not step.device_bytes
    assert not list(tmp_path.iterdir())  # what it lacks may be installed by the next time


def test_what_a_prediction_depends_on(monkeypatch, tmp_path):
    planned = config().probe_config
    key = key_of(planned)
    assert key == key_of(replace(planned, budget_gib=3.0, output="elsewhere"))
    assert key != key_of(replace(planned, gpu="rtx4090")) and key != key_of(replace(planned, lora_r=4))
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
        assert key_of(planned) != key
    with monkeypatch.context() as patch:
        patch.setattr(predictions_module, "code_state", lambda: ["another commit"])
        assert key_of(planned) != key
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((ROOT / "data/tiny_mgm/config.json").read_text())
    in_folder = replace(planned, model=str(model))
    key = key_of(in_folder)
    (model / "config.json").write_text((ROOT / "data/tiny_mgm/config.json").read_text() + "\n")
    predictions_module.model_state.cache_clear()
    assert key_of(in_folder) != key


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions_module, "figures_of", die)
    with pytest.raises(UserError, match="a process that predicts was killed"):
        with Predictions(lambda *_: None, tmp_path) as predictions:
            predictions.of([config().probe_config])


def die(config: ProbeConfig) -> None:
    os._exit(1)


def test_the_cache_needs_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder().is_relative_to(tempfile.gettempdir())


# The front


def test_the_front():
    base = config().probe_config
    figures = [(1, 10), (2, 20), (3, 15), (4, 40), (4, 30), (9, 40)]
    seen = [Prediction(replace(base, seed=i), size, size, 0, 1.0, speed) for i, (size, speed) in enumerate(figures)]
    front = Front.of([*seen, seen[0], Prediction(base, problem="refused")])
    assert len(front.steps) == 6
    assert [step.tokens_per_second for step in front.best] == [10, 20, 40]
    assert front.shown(seen[2], 10) == [seen[0], seen[1], seen[2], seen[3]]
    assert front.shown(seen[1], 2) == [seen[0], seen[3]]


# The whole


def test_an_epoch(tmp_path):
    """Of the demo's own questions: 4 samples an update."""
    planned = config(
        model="data/tiny_mgm", gradient_accumulation_steps=4, dataset=str(ensure_demo() / "validation.json")
    )
    with Predictions(lambda *_: None, tmp_path) as predictions:
        (chosen,) = predictions.of([planned.probe_config])
        epoch = epoch_of(planned, Budget.of(planned), chosen, predictions)
    assert epoch.num_updates == -(-epoch.num_samples // 4) > 10
    assert epoch.most_seconds == pytest.approx(epoch.num_updates * chosen.step_seconds)
    assert 20 < epoch.mean_tokens < 64 and epoch.seconds <= epoch.most_seconds and not epoch.counts_bytes
    packed = epoch.packed  # three samples of 37 tokens to a row of 128
    assert epoch.num_samples / 4 < packed.num_rows < epoch.num_samples / 2.5
    assert packed.gradient_accumulation_steps == 1 and packed.fits and packed.seconds > epoch.most_seconds / 4
    assert any("Packed, they fill" in line for line in epoch_lines(epoch))


def test_an_epoch_of_nothing():
    """Each of the demo's rows needs more positions than 8."""
    planned = config(model="data/tiny_mgm", max_seq_len=8, dataset=str(ensure_demo() / "validation.json"))
    with pytest.raises(UserError, match="no sample fits --max_seq_len 8"):
        with_images_of_dataset(planned)


def test_rows_have_the_images_of_the_data():
    """But for what is typed."""
    planned = config(model="data/tiny_mgm", dataset=str(ensure_demo() / "train.json"), images_per_sample=2)
    assert with_images_of_dataset(replace(planned, images_per_sample=1)).images_per_sample == 1
    assert with_images_of_dataset(planned).images_per_sample == 2


def test_a_packed_epoch(tmp_path):
    """Its updates are of packed rows."""
    flags = {"model": "data/tiny_mgm", "dataset": str(ensure_demo() / "validation.json")}
    planned = config(packing=True, **flags)
    with Predictions(lambda *_: None, tmp_path) as predictions:
        (chosen,) = predictions.of([planned.probe_config])
        epoch = epoch_of(planned, Budget.of(planned), chosen, predictions)
    assert epoch.num_samples / 4 < epoch.num_updates < epoch.num_samples / 2.5
    assert epoch.seconds == epoch.most_seconds and epoch.packed is None


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "memory_probe.py", "--plan", *TINY, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path):
    """Its last line has what is promised, and the recipe trains; later a plan that fits nothing takes it away."""
    folder = tmp_path / "plan"
    done = run("--model", "data/tiny_mgm", "--gradient_accumulation_steps", "4", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    names = {"config", "device_bytes", "host_bytes", "step_seconds", "tokens_per_second", "fits"}
    assert all(names <= row.keys() for row in result["plan"]) and result["chosen"] in result["plan"]
    assert result["chosen"]["fits"] and result["chosen"]["device_bytes"] <= result["budget_bytes"]
    assert "--recipe" in done.stdout and "**chosen**" in done.stdout
    recipe = yaml.safe_load((folder / "chosen.yaml").read_text())
    assert recipe["model"].endswith("data/tiny_mgm") and recipe["max_seq_len"] == 128
    assert {"plan.html", "plan.png", "plan.json"} <= {path.name for path in folder.iterdir()}
    trained = subprocess.run(
        [sys.executable, "train.py", "--recipe", str(folder / "chosen.yaml"), "--mixed_precision", "no"]
        + ["--max_steps", "2", "--eval_samples", "0", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["global_step"] == 2
    done = run("--budget_gib", "0.5", "--output", str(folder))
    assert done.returncode == 3 and "NOTHING FITS" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["chosen"] is None
    assert {path.name for path in folder.iterdir()} == {"plan.json", "plan.png"}


def test_flags_of_a_plan_alone_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory_probe.py", *TINY, "--allow", "length"])
    with pytest.raises(SystemExit) as raised:
        memory_probe.run_script(memory_probe.main, PlanConfig)
    assert raised.value.code == 2 and "--allow: it belongs to --plan" in capsys.readouterr().err
