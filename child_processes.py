"""Child processes that end when the process that started them ends, even by `kill -9`.

    with process_pool() as pool:                              # a fresh Python process
        result = pool.submit(function, argument).result()
    done = run_child(["eval.py", "--task", "demo"], text=True)       # subprocess.run of a script
    process = subprocess.Popen(child_command(["eval.py"]), stdin=subprocess.PIPE)

Otherwise a measurement would run on for an hour after its benchmark was killed, and keep a GPU or a core busy.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def process_pool(
    max_workers: int = 1,
    method: str = "spawn",
    preload: str | None = None,
    initializer: Callable[..., None] | None = None,
    initargs: tuple = (),
    max_tasks_per_child: int | None = None,
) -> ProcessPoolExecutor:
    """A ProcessPoolExecutor of fresh processes. `preload`: the module that `forkserver` imports once for all."""
    context = multiprocessing.get_context(method)
    if preload is not None:
        context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(
        max_workers,
        context,
        initializer=_begin,
        initargs=(initializer, initargs),
        max_tasks_per_child=max_tasks_per_child,
    )


def _begin(initializer: Callable[..., None] | None, initargs: tuple) -> None:
    """What a process of the pool runs first."""
    _end_after(multiprocessing.parent_process().join)
    if initializer is not None:
        initializer(*initargs)


def run_child(arguments: list[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` of a Python script, or of `-m` and a module, with its arguments."""
    read_end, write_end = os.pipe()
    try:
        return subprocess.run(child_command(arguments), stdin=read_end, **options)
    finally:
        os.close(read_end)
        os.close(write_end)


def child_command(arguments: list[str]) -> list[str]:
    """The command line for such a child. Its stdin must be a pipe that this process keeps open."""
    return [sys.executable, __file__, *arguments]


def _end_after(wait: Callable[[], Any]) -> None:
    def watch() -> None:
        wait()
        os._exit(1)  # ends the process from a thread, whatever the main thread is doing

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    """Run a script as Python would, until it ends or stdin closes: the system closes a dead parent's pipe."""
    _end_after(lambda: os.read(0, 1))
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
