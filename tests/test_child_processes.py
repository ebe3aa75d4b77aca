"""Processes that are left alone: what a killed one has started ends too."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from child_processes import run_child


ROOT = Path(__file__).parent.parent
STARTS = {
    "spawn": "with process_pool() as pool: pool.submit(time.sleep, 99).result()",
    "forkserver": "with process_pool(method='forkserver') as pool: pool.submit(time.sleep, 99).result()",
    "script": "run_child(['-m', 'timeit', '-n', '1', '-r', '1', '-s', 'import time', 'time.sleep(99)'])",
}


def kill_once_it_has_children(command: list[str], num_children: int) -> list[psutil.Process]:
    """`kill -9` it as soon as it has so many descendants, which are returned."""
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        children = []
        while len(children) < num_children:
            assert process.poll() is None and time.monotonic() < deadline, "it has started nothing"
            with suppress(psutil.NoSuchProcess):  # one has ended between two looks
                children = process.children(recursive=True)
            time.sleep(0.1)
        time.sleep(1)  # into the work
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
    return children


@pytest.mark.parametrize("how", STARTS)
def test_they_end_with_their_parent(how: str, tmp_path: Path) -> None:
    """However they were started; multiprocessing has a process of its own beside them (a resource tracker)."""
    code = f"import time; from child_processes import *\nif __name__ == '__main__':\n    {STARTS[how]}"
    path = tmp_path / "parent.py"  # a file: spawn reads the main script again
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    children = kill_once_it_has_children([sys.executable, str(path)], 1 if how == "script" else 2)
    assert psutil.wait_procs(children, timeout=20)[1] == []


@pytest.mark.slow
def test_a_killed_probe_leaves_nothing_behind() -> None:
    """Under ZeRO it traces in a process of its own."""
    flags = "--config_file accelerate_configs/zero3.yaml --model tiny --device cpu --max_seq_len 64"
    children = kill_once_it_has_children([sys.executable, "memory_probe.py", *flags.split()], 2)
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_script_is_run_as_python_would() -> None:
    """Its arguments, its exit code, its main module."""
    done = run_child(["-m", "json.tool", "--indent", "1", "no_such_file"], capture_output=True, text=True)
    assert done.returncode != 0 and "no_such_file" in done.stderr
    done = run_child(["eval.py", "--task", "none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --task none")
