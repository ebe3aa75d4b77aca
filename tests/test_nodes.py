"""train.py on two machines (network namespaces): the same result, and an end everywhere when one of them is lost."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_runs import Fault, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_nodes import TwoNodes, accelerate_line, slurm_line, torchrun_line

from data.demo import ensure_demo
from memory.launch import free_port


NUM_STEPS = 30
FLAGS = f"--max_steps {NUM_STEPS} --save_steps 2 --logging_steps 1 --eval_samples 0 --dataloader_num_workers 0"
FLAGS += " --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 4e-3 --lora_dropout 0"
FLAGS += " --no_rehearse --forecast false"
HALF = FLAGS.replace("batch_size 2", "batch_size 1")  # of an update's samples, on each of two processes
RESUME = " --resume_from_checkpoint latest"
LAUNCHERS = {"accelerate": accelerate_line, "torchrun": torchrun_line}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty records of the demo."""
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(json.loads((ensure_demo() / "train.json").read_text())[:40]))
    return path


@pytest.fixture(scope="module")
def reference(records: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("reference")
    ended = run(f"{FLAGS} --dataset {records} --image_folder data/demo --output_dir {folder / 'out'}", folder)
    assert ended.code == 0, ended.err[-3000:]
    return losses(folder / "out")


@pytest.fixture
def nodes(records: Path, tmp_path: Path) -> Iterator[TwoNodes]:
    """Each has a copy of the records on its own disk."""
    with TwoNodes(tmp_path) as nodes:
        for node in range(2):
            shutil.copy(records, nodes.disk_of(node) / "records.json")
        yield nodes


def losses(output_dir: Path) -> list[float]:
    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def flags_for(nodes: TwoNodes, flags: str) -> list[str]:
    return (
        f"{flags} --dataset {nodes.disk}/records.json --image_folder data/demo --output_dir {nodes.disk}/out".split()
    )


def start(nodes: TwoNodes, line: Callable[..., list[str]], flags: str, **options: str) -> None:
    port = free_port()
    for node in range(2):
        nodes.start(node, *line(node, port, **options), *flags_for(nodes, flags))


def wait_for_checkpoint(nodes: TwoNodes, step: int) -> None:
    deadline = time.monotonic() + 180
    while not (nodes.disk_of(0) / f"out/checkpoint-{step}").exists():
        assert time.monotonic() < deadline and nodes.started[0].poll() is None, nodes.log(0)[-3000:]
        time.sleep(0.02)


def assert_ends(nodes: TwoNodes, node: int, lost: str) -> None:
    """Within a minute, with a line that names the lost process, and no process is left."""
    assert nodes.wait(node, timeout=60) == 1
    assert f"error: {lost}" in nodes.log(node), nodes.log(node)[-3000:]
    assert "--resume_from_checkpoint latest" in nodes.log(node) and "Traceback" not in before_launcher(nodes.log(node))
    nodes.wait_until_empty(node, timeout=5)


def before_launcher(log: str) -> str:
    """What train.py has written, without the launcher's own report of its exit code."""
    return log.partition("torch/distributed/elastic")[0]


def assert_as_one_process(nodes: TwoNodes, reference: list[float]) -> None:
    """Every loss, each once; all that is saved lies on the main process's disk."""
    assert losses(nodes.disk_of(0) / "out") == pytest.approx(reference, abs=1e-4)
    assert (nodes.disk_of(0) / "out/adapter_model.safetensors").is_file()
    assert not (nodes.disk_of(1) / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_node_is_killed(launcher: str, nodes: TwoNodes, reference: list[float]) -> None:
    """The second under accelerate, and the run goes on with the first alone. The first, with the main process, under
    torchrun, and the run goes on with both; only the first has the checkpoint. Data is cached on each node's disk."""
    lost = 1 if launcher == "accelerate" else 0
    start(nodes, LAUNCHERS[launcher], HALF)
    wait_for_checkpoint(nodes, 4)
    nodes.kill(lost)
    assert_ends(nodes, 1 - lost, f"rank {lost} on node{lost} is gone")
    assert all(any((nodes.disk_of(node) / "datasets_cache").iterdir()) for node in range(2))
    if launcher == "accelerate":
        line = "accelerate launch --config_file accelerate_configs/single.yaml train.py"
        nodes.start(0, *line.split(), *flags_for(nodes, FLAGS + RESUME))
    else:
        start(nodes, LAUNCHERS[launcher], HALF + RESUME)
        assert nodes.wait(1) == 0, nodes.log(1)[-3000:]
    assert nodes.wait(0) == 0, nodes.log(0)[-3000:]
    assert "Resumed from" in nodes.log(0)
    assert_as_one_process(nodes, reference)


@pytest.mark.slow
def test_a_cut_link(nodes: TwoNodes) -> None:
    """Neither node hears of the other again: both end."""
    start(nodes, accelerate_line, HALF.replace(f"max_steps {NUM_STEPS}", "max_steps 10000"))
    wait_for_checkpoint(nodes, 2)
    nodes.cut()
    for node in range(2):
        assert_ends(nodes, node, f"rank {1 - node} on node{1 - node} cannot be reached")


@pytest.mark.slow
def test_zero3_under_slurm(nodes: TwoNodes, reference: list[float]) -> None:
    """Weights in parts on two machines, started as Slurm does."""
    start(nodes, slurm_line, HALF.replace("save_steps 2", "save_steps 100"), config="zero3")
    for node in range(2):
        assert nodes.wait(node) == 0, nodes.log(node)[-3000:]
    assert_as_one_process(nodes, reference)


@pytest.mark.slow
def test_other_flags_on_a_node(nodes: TwoNodes) -> None:
    """Refused in one line before anything is written."""
    port = free_port()
    for node in range(2):
        flags = HALF + (" --learning_rate 1e-3" if node else "")
        nodes.start(node, *torchrun_line(node, port), *flags_for(nodes, flags))
    for node in range(2):
        assert nodes.wait(node) == 1
        assert "error: rank 1 on node1 differs from rank 0 on node0: learning_rate is 0.004 there" in nodes.log(node)
        assert not (nodes.disk_of(node) / "out").exists()


@pytest.mark.slow
def test_doctor(nodes: TwoNodes) -> None:
    """The table, and what is wrong: other data on a node, and interfaces that do not lead to the other."""
    (nodes.disk_of(1) / "records.json").write_text(
        json.dumps(json.loads((nodes.disk_of(0) / "records.json").read_text())[:39])
    )
    port = free_port()
    for node in range(2):
        words = ["--doctor", "--model", "data/tiny_mgm", *flags_for(nodes, "")]
        nodes.start(node, *accelerate_line(node, port), *words, GLOO_SOCKET_IFNAME="lo")
    assert nodes.wait(0) == 1 and nodes.wait(1) in (0, 1)
    log = nodes.log(0)
    assert "| node0 | 0 | 10.99.0.1 | lo |" in log and "| node1 | 1 | 10.99.0.2 | lo |" in log
    assert "rank 1 on node1 has other data than rank 0 on node0: 39 records" in log
    assert "a sum over all processes fails: rank 0 on node0: " in log
    assert '{"status": "problem"' in log


RESUMED = {  # strategy and processes before, and after
    "ddp-2-to-single-1": ("ddp", 2, "single", 1),
    "single-1-to-ddp-2": ("single", 1, "ddp", 2),
    "zero2-2-to-zero2-1": ("zero2", 2, "zero2", 1),
    "zero3-2-to-zero3-1": ("zero3", 2, "zero3", 1),
    "zero3-2-to-single-1": ("zero3", 2, "single", 1),
    "ddp-2-to-zero3-2": ("ddp", 2, "zero3", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_other_processes(case: str, records: Path, reference: list[float], tmp_path: Path) -> None:
    """Killed and resumed on more or fewer processes, the losses are those of one process that was not disturbed."""
    before, num_before, after, num_after = RESUMED[case]
    places = f" --dataset {records} --image_folder data/demo --output_dir {tmp_path / 'out'}"
    fault = Fault("train.training_step", 15, "kill")  # in update 8
    ended = run((FLAGS if num_before == 1 else HALF) + places, tmp_path, before, num_before, faults=(fault,))
    assert ended.code < 0, ended.err[-3000:]
    ended = run((FLAGS if num_after == 1 else HALF) + places + RESUME, tmp_path, after, num_after)
    assert ended.code == 0, ended.err[-3000:]
    assert losses(tmp_path / "out") == pytest.approx(reference, abs=1e-4)


def test_the_page_names_the_tests() -> None:
    """Each case above has its row in docs/scaling.md, and each test named there exists."""
    page = (Path(__file__).parent.parent / "docs/scaling.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[([\w-]+)\])?`", page)
    assert {case for _, name, case in named if name == "test_other_processes"} == RESUMED.keys()
    for file, name, _ in named:
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), name
