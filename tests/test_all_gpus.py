"""Jobs on all GPUs at once: who runs what, and what a cut leaves."""

import operator
import os
import time
from multiprocessing import active_children

import pytest

from benchmarks.all_gpus import Job, added, run_jobs


def test_each_gpu_takes_the_next_job(capsys):
    """A job sees one GPU. One that fails is named, and the others go on."""
    kept = []
    jobs = [Job(f"job {i}", os.getenv, ("CUDA_VISIBLE_DEVICES",), kept.append) for i in range(6)]
    jobs.insert(1, Job("broken", operator.truediv, (1, 0), kept.append))
    assert run_jobs(jobs, 2, time.monotonic() + 60) == 1
    assert len(kept) == 6 and set(kept) <= {"0", "1"}
    assert "broken: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_under_way_is_cut_off():
    kept = []
    jobs = [Job("quick", abs, (-1,), kept.append)] + [Job("slow", time.sleep, (600,), kept.append)] * 3
    start = time.monotonic()
    assert run_jobs(jobs, 2, start + 40) == 3
    assert time.monotonic() - start < 90 and kept == [1] and not active_children()


def test_shares_are_added():
    shares = [{"passed": 2, "failures": ["a"]}, {"passed": 3, "failures": []}]
    assert added(shares) == {"passed": 5, "failures": ["a"]}
