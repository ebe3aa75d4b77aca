"""Run the tests that need a GPU, and record the commit that they tested:

    python -m benchmarks.gpu_tests                                              # needs a GPU
    python -m benchmarks.gpu_tests --output results/gpu/tests_two_gpus.json     # needs two

Writes results/gpu/tests.json or the other file, and the table of docs/gpu_guide.md. On any machine a test warns when
the code has changed since (tests/test_gpu_record.py). The last line on stdout is the same as JSON.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import ROOT, commit, gpu_machine
from benchmarks.tables import GPU_TESTS, write_tables
from utils import UserError, flag, run_script, write_json


@dataclass(kw_only=True)
class GpuTestsConfig:
    commit: str | None = flag(None, "the commit under test; default: git's HEAD")
    output: str = str(GPU_TESTS)


def main(config: GpuTestsConfig) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise UserError("python -m benchmarks.gpu_tests: this machine has no GPU")
    tested = config.commit or head()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"], cwd=ROOT)
        if not report.exists():
            raise UserError("pytest -m gpu ended without a report: what it printed says why")
        counted = counts(report)
    record = gpu_machine() | {"num_gpus": torch.cuda.device_count(), "commit": tested} | counted
    write_json(config.output, record)
    write_tables()
    return record


def head() -> str:
    """The commit that is checked out. Raises UserError outside a git checkout, or if files differ from the commit."""
    found = commit()
    if found is None:
        raise UserError("this folder is no git checkout: name what is tested with --commit")
    if found.endswith("-dirty"):
        raise UserError("there are changes that are not committed: commit them first, then test the commit")
    return found


def counts(report: Path) -> dict[str, Any]:
    """From JUnit's XML: how many tests passed, failed and were skipped, the names of those that failed, seconds."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "seconds": round(sum(float(case.get("time", 0)) for case in cases)),
    }


if __name__ == "__main__":
    run_script(main, GpuTestsConfig, exit_code=lambda result: 1 if result["failed"] else 0)
