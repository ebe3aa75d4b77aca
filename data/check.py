"""Look through a whole data set before training: every record, every image, on all cores.

    python -m data.check my.json --image_folder my_images
    python -m data.check my.json --image_folder my_images --model mgm-2b --max_seq_len 1024      # lengths too

The report on stdout lists what train.py would refuse or skip, and counts what it accepts but may be a mistake. The
last line is JSON. Exit code 0: every record can be used; 2: some cannot.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NoReturn

import quiet  # noqa: F401 (before PEFT)

import datasets
import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from chat.messages import ROLES
from child_processes import process_pool
from data.dataset import PROBLEM, ConversationDataset, open_dataset
from data.images import MOVED
from data.lengths import column_values, count_cut, with_lengths
from data.turn_ends import missing_turn_end
from models.loading import check_is_no_preset, load_processor
from utils import UserError, check_minimum, flag, run_script


SAMPLES_AT_ONCE = 64  # for one process: some seconds of work
NUM_IN_JSON = 20  # bad records that the last line names; the report names them all


@dataclass(kw_only=True)
class CheckConfig:
    dataset: str = field(metadata={"help": ".json, .jsonl, .parquet, folder or hub id"})
    image_folder: str | None = flag(None, "folder that image names start from; default: the data set's own")
    follow_links: bool = flag(False, "allow links out of the image folder")
    model: str | None = flag(None, "folder or hub id of a model: count tokens with its processor")
    max_seq_len: int = flag(2048, "for --model: the longest sample, in tokens, image positions included")
    max_image_pixels: int = flag(0, "for --model: shrink larger images to so many pixels; 0: as the processor does")
    num_proc: int = flag(os.cpu_count() or 1, "processes that open images")

    def __post_init__(self) -> None:
        check_minimum(self, max_seq_len=1, max_image_pixels=0, num_proc=1)


def main(config: CheckConfig) -> dict[str, Any]:
    dataset = open_dataset(config.dataset, config.image_folder, skips_bad=True, follow_links=config.follow_links)
    num_records = len(dataset) + len(dataset.problems)
    problems = list(dataset.problems.values()) + list(find_bad_samples(dataset, config.num_proc))
    notes = {MOVED: dataset.num_moved, **find_notes(dataset.records)}
    if config.model is not None:
        notes |= find_long(dataset, config)
    print(report(num_records, problems, notes), flush=True)
    return {
        "status": "bad" if problems else "good",
        "records": num_records,
        "bad": len(problems),
        "problems": problems[:NUM_IN_JSON],
        "notes": {note: count for note, count in notes.items() if count},
    }


def find_bad_samples(dataset: ConversationDataset, num_processes: int) -> Iterator[str]:
    """What is wrong with each sample whose images cannot be loaded."""
    starts = range(0, len(dataset), SAMPLES_AT_ONCE)
    with (
        process_pool(
            num_processes, "forkserver", preload="data.dataset", initializer=_take, initargs=(dataset,)
        ) as pool,
        tqdm(total=len(dataset), desc="Checking", unit="sample") as progress,
    ):
        try:
            for problems in pool.map(_check_from, starts):
                progress.update(min(SAMPLES_AT_ONCE, len(dataset) - progress.n))
                yield from problems
        except BrokenProcessPool:
            where = f"among samples {progress.n} to {progress.n + num_processes * SAMPLES_AT_ONCE}"
            raise UserError(f"a process was killed {where}: is memory short? Try a smaller --num_proc") from None


def _take(dataset: ConversationDataset) -> None:
    """Runs once in each process of the pool."""
    global _dataset
    _dataset = dataset


def _check_from(start: int) -> list[str]:
    stop = min(start + SAMPLES_AT_ONCE, len(_dataset))
    samples = (_dataset[index] for index in range(start, stop))
    return [sample[PROBLEM] for sample in samples if PROBLEM in sample]


def find_notes(records: datasets.Dataset) -> dict[str, int]:
    """Counts of what is odd in records that can be used."""
    counts = pc.value_counts(records.data.column("id")).field("counts")
    notes = Counter({"ids that several records share": int(pc.sum(pc.greater(counts, 1)).as_py() or 0)})
    for conversation in records["conversations"]:
        replies = [turn["value"] for turn in conversation if ROLES[turn["from"]] == "assistant"]
        notes["records with an empty reply"] += not all(reply.strip() for reply in replies)
        notes["records with a NUL character"] += any("\0" in turn["value"] for turn in conversation)
    return dict(notes)


def find_long(dataset: ConversationDataset, config: CheckConfig) -> dict[str, int]:
    """How many records --max_seq_len cuts, how many it leaves out, and whether replies have an end of turn."""
    check_is_no_preset(config.model)
    processor = load_processor(config.model)
    lacks_turn_end = missing_turn_end(config.model, processor, dataset.records[0]) is not None
    measured = with_lengths(dataset, processor, config.max_seq_len, config.max_image_pixels)
    num_tokens = column_values(measured, "num_tokens")
    num_long, num_cut = int(np.sum(num_tokens > config.max_seq_len)), count_cut(measured, config.max_seq_len)
    return {
        "chat template without an end of turn, which train.py refuses": int(lacks_turn_end),
        f"records cut off at {config.max_seq_len} tokens": num_cut,
        f"records left out at {config.max_seq_len} tokens": num_long - num_cut,
        "tokens of the longest record": int(num_tokens.max()),
    }


def report(num_records: int, problems: list[str], notes: dict[str, int]) -> str:
    lines = [f"{num_records} records, {len(problems)} cannot be used"]
    lines += [f"  {problem}" for problem in problems]
    lines += [f"Note: {count} {note}" for note, count in notes.items() if count]
    return "\n".join(lines)


def run() -> NoReturn:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    run_script(main, CheckConfig, exit_code=lambda result: 2 if result["bad"] else 0)


if __name__ == "__main__":
    from data.check import run  # the pool's processes import the module by its name

    run()
