"""How long a training run takes to open a large LLaVA file, first and again, and how much memory it needs:

    python -m benchmarks.load_dataset --num_records 1200000    # no GPU; half an hour, 3.5 GB of disk

It writes a file of conversations. A fresh process opens it as train.py does (reading, checking, counting tokens); then
another one opens it again, from the cache. `--dataset FILE` only opens that file. The last line on stdout is JSON;
results/data_scale.json holds one.
"""

import json
import os
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.loader import PACKAGES
from benchmarks.rows import machine
from child_processes import run_child
from data.batching import UpdateBatchSampler
from data.lengths import column_values
from models.loading import load_processor
from train import TrainConfig, build_datasets
from utils import check_minimum, flag, run_script


WORDS = (
    "a the of and in on with near behind small large old red white wooden open bright busy quiet round man woman "
    "child dog street table window building river tree car sign boat market kitchen picture shows stands holds looks "
    "walks sits carries appears seems likely several people background foreground weather morning afternoon"
).split()
NUM_IMAGES = 16  # shared by all records: reading looks up each file name once, however many records name it


@dataclass(kw_only=True)
class LoadConfig:
    num_records: int = flag(1_200_000, "1,200,000 make 1.7 GB")
    folder: str | None = flag(None, "of the file and its cache, deleted after; default: temporary")
    dataset: str | None = flag(None, "open this file, write none")

    def __post_init__(self) -> None:
        check_minimum(self, num_records=1)


def main(config: LoadConfig) -> dict:
    if config.dataset is not None:
        return load(config.dataset)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path = Path(folder) / "data.json"
        write_dataset(path, config.num_records)
        sizes = {"num_records": config.num_records, "file_bytes": path.stat().st_size}
        runs = {name: load_in_new_process(path) for name in ("first_load", "restart")}
        cache = sum(file.stat().st_size for file in Path(folder).rglob("*.arrow"))
    return {"benchmark": "load_dataset", **sizes, "cache_bytes": cache, **machine(*PACKAGES), **runs}


def write_dataset(path: Path, num_records: int) -> None:
    """A LLaVA file, written record by record, with its few images beside it."""
    for i in range(NUM_IMAGES):
        Image.new("RGB", (64, 64), (i * 15, 0, 0)).save(path.parent / f"{i}.jpg")
    with open(path, "w") as file:
        for i, record in enumerate(generate_records(num_records)):
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]\n")


def generate_records(num_records: int) -> Iterator[dict]:
    """Conversations of one to five questions about an image, about 1.4 kB each; ids with leading zeros."""
    generator = random.Random(0)
    questions = ["What " + " ".join(generator.choices(WORDS, k=generator.randint(5, 20))) + "?" for _ in range(5000)]
    sentences = [" ".join(generator.choices(WORDS, k=generator.randint(9, 23))) + "." for _ in range(5000)]
    for i in range(num_records):
        turns = []
        for number in range(generator.randint(1, 5)):
            image = "" if number else "<image>\n"
            turns.append({"from": "human", "value": image + generator.choice(questions)})
            turns.append({"from": "gpt", "value": " ".join(generator.choices(sentences, k=generator.randint(1, 5)))})
        yield {"id": f"{i:012}", "image": f"{i % NUM_IMAGES}.jpg", "conversations": turns}


def load_in_new_process(path: Path) -> dict:
    """The result of `load` with the cache in the file's folder; `process_seconds` counts imports and exit too."""
    environ = {**os.environ, "HF_DATASETS_CACHE": str(path.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = ["-m", "benchmarks.load_dataset", "--dataset", str(path)]
    start = time.perf_counter()
    process = run_child(arguments, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(process.stdout.splitlines()[-1]), "process_seconds": round(time.perf_counter() - start, 1)}


def load(path: str) -> dict:
    """Everything train.py does with a data set before the first step: seconds, and the peak resident bytes of this
    process and of its largest child."""
    config = TrainConfig(dataset=path, eval_samples=0)
    processor = load_processor(config.model)
    start, cpu_before = time.perf_counter(), time.process_time()
    dataset, _ = build_datasets(config, processor)
    num_tokens = column_values(dataset.records, "num_tokens")
    sampler = UpdateBatchSampler(column_values(dataset.records, "num_label_tokens"), 1, 128, 1, 0, num_tokens, True)
    first = next(iter(sampler))
    sample_id = dataset[first[0]]["id"]
    seconds = time.perf_counter() - start
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime - cpu_before, 1),
        "peak_rss_bytes": own.ru_maxrss * 1024,  # Linux counts in KiB
        "child_peak_rss_bytes": children.ru_maxrss * 1024,
        "usable_records": len(dataset),
        "first_id": sample_id,
    }


if __name__ == "__main__":
    run_script(main, LoadConfig)
