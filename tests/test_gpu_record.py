"""What results/gpu/tests.json says of the GPU tests, and whether it still holds for the code that is here."""

import json
import subprocess
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_tests
from benchmarks.gpu_tests import GpuTestsConfig
from benchmarks.tables import GPU_TESTS, ROOT
from utils import UserError


# What the step, a run and the model are made of.
CODE = ["*.py", "accelerate_configs", ":!tests", ":!benchmarks"]


def changed_since(commit: str) -> list[str] | None:
    """The files of the code that differ from a commit; None where git cannot tell."""
    command = ["git", "diff", "--name-only", commit, "--", *CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else None


def test_the_record_holds() -> None:
    """It has the keys that are promised. Where it is stale, a warning says so."""
    record = json.loads(GPU_TESTS.read_text())
    assert {"gpu", "torch", "commit", "passed", "failed", "skipped"} <= record.keys()
    changed = changed_since(record["commit"])
    if changed is None:
        warnings.warn(f"the GPU tests ran on {record['commit'][:8]}, which this checkout does not have", stacklevel=1)
    elif changed:
        files = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        warnings.warn(
            f"{len(changed)} files have changed since the GPU tests ran on {record['commit'][:8]} ({files}): "
            "run python -m benchmarks.gpu_tests where there is a GPU",
            stacklevel=1,
        )


def test_changes_are_seen() -> None:
    """Against the first commit nearly everything has changed; against a commit that is not there git cannot tell."""
    first = subprocess.run(["git", "rev-list", "--max-parents=0", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if first.returncode:
        pytest.skip("no git checkout")
    assert "train.py" in changed_since(first.stdout.split()[0])
    assert changed_since("0" * 40) is None


def test_counts(tmp_path: Path) -> None:
    """Passed, failed, in error and skipped, from a report as pytest writes it."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_in_error(nothing): pass\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    report = tmp_path / "report.xml"
    pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={report}", str(tmp_path)])
    assert ElementTree.parse(report)
    counted = gpu_tests.counts(report)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 2, 1)
    assert [name.rpartition("::")[2] for name in counted["failures"]] == ["test_fails", "test_in_error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(UserError, match="this machine has no GPU"):
        gpu_tests.main(GpuTestsConfig())
