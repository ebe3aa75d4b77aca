"""MGM-2B's published scores and the model's own, with what the runs took: TextVQA and MMBench.

    python -m benchmarks.published --model mgm-2b --folder benchmark_files

`--folder` holds the benchmarks' own files, by the names in FILES. The two runs are eval.py's: interrupted, the same
command goes on. Writes published.json beside their results; the last line on stdout is the same as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT, run_quietly
from utils import GIB, UserError, environment, flag, flag_words, markdown_table, run_script, write_json


PUBLISHED = {"textvqa": 56.2, "mmbench": 59.8}  # MGM-2B, arXiv:2403.18814, table 1
FILES = {
    "textvqa": {
        "dataset": "TextVQA_0.5.1_val.json",
        "image_folder": "train_images",
        "ocr_file": "llava_textvqa_val_v051_ocr.jsonl",
    },
    "mmbench": {"dataset": "mmbench_dev_20230712.tsv"},
}
SETTINGS = {"textvqa": {}, "mmbench": {"circular": True}}


@dataclass(kw_only=True)
class PublishedConfig:
    model: str = flag("mgm-2b", "folder of the released model, converted")
    adapter: str | None = flag(None, "folder of a PEFT adapter: what of the scores it keeps")
    folder: str = flag("benchmark_files", "folder with the benchmarks' files")
    batch_size: int = flag(8, "questions answered at once; changes no answer")
    dataloader_num_workers: int = flag(2, "processes that open images ahead")
    output: str = flag("outputs/eval/published", "folder of the results")

    def __post_init__(self) -> None:
        names = [name for files in FILES.values() for name in files.values()]
        if missing := [name for name in names if not (Path(self.folder) / name).exists()]:
            raise UserError(f"--folder {self.folder}: no {missing[0]} in it; docs/evaluation.md says where it is from")


def main(config: PublishedConfig) -> dict[str, Any]:
    results = {task: evaluate(task, config) for task in PUBLISHED}
    print(as_table(results))
    summary = {"model": config.model, "adapter": config.adapter, "published": PUBLISHED, "results": results}
    summary["environment"] = environment("torch", "transformers")
    write_json(Path(config.output) / "published.json", summary)
    return summary


def evaluate(task: str, config: PublishedConfig) -> dict[str, Any]:
    """The result of eval.py, of an earlier run where that has finished. Raises UserError if it fails."""
    output = Path(config.output) / f"{task}.json"
    if not output.exists():
        shared = {name: getattr(config, name) for name in ("adapter", "batch_size", "dataloader_num_workers")}
        files = {name: str(Path(config.folder) / value) for name, value in FILES[task].items()}
        flags = {"model": config.model, "task": task, "output": str(output)} | shared | files | SETTINGS[task]
        run_quietly([sys.executable, str(ROOT / "eval.py"), *flag_words(flags)], f"eval.py --task {task}")
    result = json.loads(output.read_text())
    return {name: result[name] for name in ("metric", "score", "n", "seconds", "peak_allocated_bytes")}


def as_table(results: dict[str, dict[str, Any]]) -> str:
    """Scores in percent, as they are published."""
    rows = []
    for task, result in results.items():
        peak = result["peak_allocated_bytes"]
        cells = [task, PUBLISHED[task], f"{100 * result['score']:.1f}", result["n"], f"{result['seconds']:.0f}"]
        rows.append([*cells, f"{peak / GIB:.2f} GiB" if peak else "-"])
    return markdown_table(["task", "published", "here", "questions", "seconds", "peak of tensors"], rows)


if __name__ == "__main__":
    run_script(main, PublishedConfig)
