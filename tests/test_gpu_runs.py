"""train.py and eval.py on a GPU, as users start them: every strategy learns, nothing is lost, memory that runs out is
explained."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked_runs import Fault, run
from peft import PeftModel
from safetensors.torch import load_file

from data.worst_case import worst_case_batch
from train import StepConfig
from utils import load_model


ROOT = Path(__file__).parent.parent
NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TWO_GPUS = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
RUNS = [(config, 1, precision) for config in ("single", "zero2", "zero3") for precision in ("bf16", "fp16")]
RUNS += [(config, 2, precision) for config in ("ddp", "zero2", "zero3") for precision in ("bf16", "fp16")]
DEMO = "--dataset data/demo/train.json --eval_dataset data/demo/validation.json --learning_rate 4e-3"
DEMO += " --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --logging_steps 1 --forecast false"
SMALL = f"{DEMO} --max_steps 12 --save_steps 4 --eval_samples 16"
RESUME = " --resume_from_checkpoint latest"


def launch(folder: Path, config: str, num_processes: int, flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += ["--config_file", f"accelerate_configs/{config}.yaml", "train.py", *flags.split()]
    return subprocess.run(
        [*command, "--output_dir", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Future]:
    """All runs of the demo, a few at a time: the GPU has room for many tiny models."""
    pool = ThreadPoolExecutor(max_workers=max(2, len(os.sched_getaffinity(0)) // 4))
    folder = tmp_path_factory.mktemp("demo")
    flags = f"{DEMO} --max_steps 120 --eval_samples 64 --save_steps 0"
    futures = {}
    for config, num_processes, precision in [key for key in RUNS if key[1] <= NUM_GPUS]:
        output_dir = folder / f"{config}-{num_processes}-{precision}"
        futures[config, num_processes, precision] = pool.submit(
            launch, output_dir, config, num_processes, f"{flags} --mixed_precision {precision}"
        )
    yield futures
    pool.shutdown()


@pytest.mark.parametrize(
    ("config", "num_processes", "precision"),
    [pytest.param(*key, marks=[TWO_GPUS] if key[1] == 2 else []) for key in RUNS],
)
def test_the_demo_learns(config: str, num_processes: int, precision: str, demo_runs: dict) -> None:
    """With the rehearsal and checkpointing, in 16 bits. fp16's scaler may skip a few updates."""
    done = demo_runs[config, num_processes, precision].result()
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(config, num_processes, precision, result["train_loss"], result["last_loss"], result["eval"])
    assert result["environment"]["mixed_precision"] == precision
    assert result["environment"]["num_processes"] == num_processes
    assert result["config"]["rehearse"] and result["config"]["gradient_checkpointing"]
    assert result["skipped_updates"] <= (6 if precision == "fp16" else 0)
    assert result["last_loss"] < 1.6 < 3 < first_loss(done.stderr), "it did not learn"


def first_loss(progress: str) -> float:
    return float(re.search(r"loss ([\d.]+)", progress)[1])


def test_the_main_command(tmp_path: Path) -> None:
    """`python train.py` as it stands, all of it: 7 % of the answers before, 80 % and more after."""
    command = [sys.executable, "train.py", "--output_dir", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result["eval"], result["memory"], result["tokens_per_second"])
    assert result["eval"]["exact_match_before"] < 0.2 and result["eval"]["exact_match"] > 0.8
    assert abs(result["memory"]["error"]) < 0.03


def trained(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}/trained-00001.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far parameters lie apart, relative to how far the largest is from zero."""
    names = [name for name in one if name.startswith("parameter")]
    return max(((one[name] - other[name]).norm() / (one[name].norm() + 1e-8)).item() for name in names)


@pytest.mark.parametrize("config", ["single", "zero2", "zero3"])
def test_killed_and_resumed(config: str, tmp_path: Path) -> None:
    """Killed in step 7 and resumed from step 4: the parameters are as near to an undisturbed run's as a second
    undisturbed run's are. With another seed, and so with another dropout, they are far from them."""
    flags = f"{SMALL} --mixed_precision bf16 --attn_implementation eager --eval_samples 0"
    folders = {name: tmp_path / name for name in ("undisturbed", "again", "resumed", "other")}
    for name, more in (("undisturbed", ""), ("again", ""), ("other", " --seed 7")):
        ended = run(f"{flags}{more} --output_dir {folders[name]}", tmp_path / "logs", config)
        assert ended.code == 0, ended.err[-3000:]
    fault = Fault("train.training_step", 7, "kill")
    assert run(f"{flags} --output_dir {folders['resumed']}", tmp_path / "logs", config, faults=(fault,)).code < 0
    ended = run(f"{flags} --output_dir {folders['resumed']}{RESUME}", tmp_path / "logs", config)
    assert ended.code == 0 and "Resumed from" in ended.out, ended.err[-3000:]
    states = {name: trained(folder, 12) for name, folder in folders.items()}
    again, resumed, other = (difference(states["undisturbed"], states[name]) for name in ("again", "resumed", "other"))
    print(f"{config}: a second run {again:.2e}, resumed {resumed:.2e}, another seed {other:.2e}")
    assert resumed <= max(3 * again, 1e-6) or resumed < other / 100
    assert resumed < other / 10


def test_nf4_trains_and_reloads(tmp_path: Path) -> None:
    """4-bit weights on the GPU; eval.py takes the adapter onto the unquantized base."""
    output_dir = tmp_path / "nf4"
    ended = run(f"{SMALL} --quantize nf4 --mixed_precision bf16 --output_dir {output_dir}", tmp_path / "logs")
    assert ended.code == 0, ended.err[-3000:]
    assert ended.result["last_loss"] < ended.result["train_loss"]
    assert evaluate(output_dir, tmp_path / "answers.json", 8)["n"] == 32


def evaluate(adapter: Path, output: Path, batch_size: int) -> dict:
    flags = f"--adapter {adapter} --limit 32 --batch_size {batch_size} --mixed_precision no --output {output}"
    done = subprocess.run(
        [sys.executable, "eval.py", *flags.split()], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    ended = run(f"{SMALL} --mixed_precision bf16 --output_dir {folder / 'out'}", folder / "logs")
    assert ended.code == 0, ended.err[-3000:]
    return folder / "out"


def test_eval_in_batches(adapter: Path, tmp_path: Path) -> None:
    """In fp32 as one by one."""
    answers = []
    for batch_size in (1, 32):
        result = evaluate(adapter, tmp_path / f"{batch_size}.json", batch_size)
        rows = [json.loads(line) for line in Path(result["predictions"]).read_text().splitlines()[1:]]
        answers.append({row["index"]: row["prediction"] for row in rows})
    assert answers[0] == answers[1] and len(answers[0]) == 32


def test_merged(adapter: Path) -> None:
    """The merged model's logits are the adapter's."""
    base = str(ROOT / "data/tiny_mgm")
    model = PeftModel.from_pretrained(load_model(base, torch.float32, "sdpa"), adapter).cuda().eval()
    step_config = StepConfig(model=base, mixed_precision="no", max_seq_len=40, per_device_train_batch_size=2)
    batch = worst_case_batch(model.config, step_config, images_per_sample=1)
    batch = {name: tensor.cuda() for name, tensor in batch.items() if not name.startswith("label")}
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    plain = load_model(base, torch.float32, "sdpa").cuda().eval()
    with torch.no_grad():
        assert (plain(**batch).logits - expected).abs().max() > 1e-2, "the adapter changes nothing"
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("function", ["rehearsal.worst_case_batch", "train.training_step"])
def test_out_of_memory_in_training(function: str, tmp_path: Path) -> None:
    """The allocator may have 64 MiB more from here on, and the step needs more: explained in a line, the prediction
    above it, a snapshot beside it."""
    flags = SMALL.replace("train_batch_size 16", "train_batch_size 2048") + " --mixed_precision bf16 --eval_samples 0"
    flags += " --no_rehearse" if function.startswith("train") else ""
    fault = Fault(function, 1, "little memory")
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path / "logs", faults=(fault,))
    assert ended.code == 2, ended.err[-3000:]
    where = "before step 1" if function.startswith("rehearsal") else "in step 1"
    assert f"out of memory {where}" in ended.error and "Tried to allocate" in ended.error
    for words in ("Predicted: ", "At the peak:", "What to change:", "Allocator snapshot: "):
        assert words in ended.err, words
    assert (tmp_path / "out/oom_snapshot.pickle").stat().st_size > 1000


def test_out_of_memory_in_the_last_evaluation(tmp_path: Path) -> None:
    """What was trained is there, and answers questions."""
    flags = SMALL.replace("eval_batch_size 16", "eval_batch_size 1024").replace("eval_samples 16", "eval_samples 1024")
    fault = Fault("train.save_trained", 1, "little memory")
    ended = run(f"{flags} --save_steps 0 --output_dir {tmp_path / 'out'}", tmp_path / "logs", faults=(fault,))
    assert ended.code == 2, ended.err[-3000:]
    assert "while answering held-out questions, 1024 at a time (--per_device_eval_batch_size)" in ended.error
    assert f"What was trained is saved in {tmp_path / 'out'}" in ended.error
    assert evaluate(tmp_path / "out", tmp_path / "answers.json", 8)["n"] == 32


def test_doctor(tmp_path: Path) -> None:
    """It sees the GPU and finds nothing with which training would fail."""
    command = [sys.executable, "train.py", "--doctor", "--model", "mgm-2b", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    found = json.loads(done.stdout.splitlines()[-1])["findings"]
    assert torch.cuda.get_device_name() in done.stdout
    problems = [finding["what"] for finding in found if finding["mark"] == "problem"]
    assert [what for what in problems if not what.startswith("accelerate is another")] == [], done.stdout
