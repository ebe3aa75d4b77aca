"""train.py and eval.py on a GPU, as users start them: every strategy learns, nothing is lost, memory that runs out is
explained."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked_runs import Fault, Run, run
from peft import PeftModel
from safetensors.torch import load_file

from data.worst_case import worst_case_batch
from train import StepConfig
from utils import load_model


ROOT = Path(__file__).parent.parent
NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TWO_GPUS = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
STRATEGIES = ("single", "zero2", "zero3")
RUNS = [(config, 1, precision) for config in STRATEGIES for precision in ("bf16", "fp16")]
RUNS += [(config, 2, precision) for config in ("ddp", "zero2", "zero3") for precision in ("bf16", "fp16")]
DEMO = "--dataset data/demo/train.json --eval_dataset data/demo/validation.json --learning_rate 4e-3"
DEMO += " --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --logging_steps 1 --forecast false"
SMALL = f"{DEMO} --max_steps 12 --save_steps 4 --eval_samples 16"
RESUME = " --resume_from_checkpoint latest"


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Runs side by side: a GPU has room for many tiny models."""
    with ThreadPoolExecutor(max_workers=max(2, len(os.sched_getaffinity(0)) // 3)) as executor:
        yield executor


def command(words: str, output_dir: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words.split(), "--output_dir", str(output_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def demo_runs(
    pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, str] | str, Future]:
    """Short runs of the demo under every strategy that there are GPUs for, and the README's command."""
    folder = tmp_path_factory.mktemp("demo")
    futures = {"python train.py": pool.submit(command, "train.py", folder / "main")}
    for config, num_processes, precision in [key for key in RUNS if key[1] <= NUM_GPUS]:
        launch = f"-m accelerate.commands.launch --config_file accelerate_configs/{config}.yaml"
        words = f"{launch} --num_processes {num_processes} train.py {DEMO} --max_steps 120 --eval_samples 64"
        words += f" --save_steps 0 --mixed_precision {precision}"
        output_dir = folder / f"{config}-{num_processes}-{precision}"
        futures[config, num_processes, precision] = pool.submit(command, words, output_dir)
    return futures


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


def test_the_main_command(demo_runs: dict) -> None:
    """`python train.py` as it stands, all of it: 7 % of the answers before, 80 % and more after."""
    done = demo_runs["python train.py"].result()
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


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each strategy the output folders of an undisturbed run, another one, one with another seed, and one that was
    killed in step 7 and resumed from step 4. All at once."""
    folder = tmp_path_factory.mktemp("killed")
    flags = f"{SMALL} --mixed_precision bf16 --attn_implementation eager --eval_samples 0"
    fault = Fault("train.training_step", 7, "kill")
    variants = {"undisturbed": ("", ()), "again": ("", ()), "other": (" --seed 7", ()), "resumed": ("", (fault,))}
    folders = {config: {name: folder / config / name for name in variants} for config in STRATEGIES}

    def start(config: str, name: str, more: str = "", faults: tuple[Fault, ...] = ()) -> Run:
        path = folders[config][name]
        return Run(f"{flags}{more} --output_dir {path}", path.with_name(f"{name}-logs"), config, faults=faults)

    runs = {(config, name): start(config, name, *how) for config in STRATEGIES for name, how in variants.items()}
    for (_, name), started in runs.items():
        ended = started.wait()
        assert ended.code < 0 if name == "resumed" else ended.code == 0, ended.err[-3000:]
    for started in [start(config, "resumed", RESUME) for config in STRATEGIES]:
        ended = started.wait()
        assert ended.code == 0 and "Resumed from" in ended.out, ended.err[-3000:]
    return folders


@pytest.mark.parametrize("config", STRATEGIES)
def test_killed_and_resumed(config: str, killed_runs: dict) -> None:
    """The parameters are as near to an undisturbed run's as a second undisturbed run's are. With another seed, and so
    with another dropout, they are far from them."""
    states = {name: trained(folder, 12) for name, folder in killed_runs[config].items()}
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
    words = [sys.executable, "eval.py", *flags.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
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


@pytest.fixture(scope="module")
def starved_runs(pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Future]]:
    """From a function on, the allocator may have 64 MiB more, and what comes then needs more."""
    folder = tmp_path_factory.mktemp("starved")
    large = SMALL.replace("train_batch_size 16", "train_batch_size 2048") + " --mixed_precision bf16 --eval_samples 0"
    asked = SMALL.replace("eval_batch_size 16", "eval_batch_size 1024").replace("eval_samples 16", "eval_samples 1024")
    futures = {}
    for when, function, flags in (
        ("before step 1", "rehearsal.worst_case_batch", large),
        ("in step 1", "train.training_step", f"{large} --no_rehearse"),
        ("while answering held-out questions", "train.save_trained", f"{asked} --save_steps 0"),
    ):
        path = folder / when.replace(" ", "_")
        fault = Fault(function, 1, "little memory")
        future = pool.submit(run, f"{flags} --output_dir {path}", folder / f"{path.name}-logs", faults=(fault,))
        futures[when] = path, future
    return futures


@pytest.mark.parametrize("when", ["before step 1", "in step 1", "while answering held-out questions"])
def test_out_of_memory(when: str, starved_runs: dict, tmp_path: Path) -> None:
    """Explained in a line, the prediction above it, a snapshot beside it. What was trained is not lost."""
    path, future = starved_runs[when]
    ended = future.result()
    assert ended.code == 2, ended.err[-3000:]
    assert f"out of memory {when}" in ended.error and "Tried to allocate" in ended.error
    for words in ("Predicted: ", "At the peak:", "What to change:", "Allocator snapshot: "):
        assert words in ended.err, words
    assert (path / "oom_snapshot.pickle").stat().st_size > 1000
    if when.startswith("while answering"):
        assert "1024 at a time (--per_device_eval_batch_size)" in ended.error
        assert f"What was trained is saved in {path}" in ended.error
        assert evaluate(path, tmp_path / "answers.json", 8)["n"] == 32


def test_doctor(tmp_path: Path) -> None:
    """It sees the GPU and finds nothing with which training would fail."""
    done = command("train.py --doctor --model mgm-2b", tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])["findings"]
    assert torch.cuda.get_device_name() in done.stdout
    problems = [finding["what"] for finding in found if finding["mark"] == "problem"]
    assert [what for what in problems if not what.startswith("accelerate is another")] == [], done.stdout
