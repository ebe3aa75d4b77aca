"""How many images a second a loader's worker prepares for MGM-2B, and whether its memory stays flat:

    python -m benchmarks.loader --seconds 60 --num_workers 2    # no GPU; 60 seconds with 2 workers, with 1 and with 0

The images are synthetic photographs of 1024 x 768, the views those of the released MGM-2B, and the tokenizer the tiny
model's. The last line on stdout is JSON; results/loader.json holds one.
"""

import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.rows import machine
from data.batching import TrainCollator, UpdateBatchSampler
from data.dataset import open_dataset
from data.lengths import column_values, measure_lengths
from mgm.processing_mgm import MGMProcessor
from models.loading import load_processor
from utils import GIB, check_choice, check_minimum, flag, run_script


PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "pillow")
MARKS = (0.25, 0.5, 1.0)  # shares of the time at which memory is measured


@dataclass(kw_only=True)
class LoaderConfig:
    seconds: float = flag(60, "with each number of workers")
    num_workers: int = flag(2, "from 0 up to this")
    batch_size: int = 4
    num_images: int = 200
    source: str = flag("json", "json: image files | parquet: images inside")

    def __post_init__(self) -> None:
        check_minimum(self, seconds=1, num_workers=0, batch_size=1, num_images=1)
        check_choice("source", self.source, ("json", "parquet"))


def main(config: LoaderConfig) -> dict:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(Path(folder), config)
        # Downwards: workers are forked, and their memory begins with what this process has used by then.
        for num_workers in range(config.num_workers, -1, -1):
            runs.append(soak(path, num_workers, config))
            resident = [sum(mark["workers_rss_bytes"], mark["main_rss_bytes"]) for mark in runs[-1]["memory"]]
            sizes = ", ".join(f"{nbytes / GIB:.2f}" for nbytes in resident)
            print(f"{num_workers} workers: {runs[-1]['images_per_second']:.1f} images/s, resident {sizes} GiB")
    return {"benchmark": "loader", **asdict(config), **machine(*PACKAGES), "runs": runs}


def write_dataset(folder: Path, config: LoaderConfig) -> Path:
    """A LLaVA file over image files, or a parquet file with the images inside, in row groups as `datasets` writes."""
    turns = [{"from": "human", "value": "<image>\nWhat is in it?"}, {"from": "gpt", "value": "Hills and some clouds."}]
    records = [{"id": f"{i:05}", "image": f"{i:05}.jpg", "conversations": turns} for i in range(config.num_images)]
    photographs = zip(records, photographs_as_jpeg(config.num_images), strict=True)
    if config.source == "parquet":
        rows = [{**record, "image": {"bytes": jpeg, "path": record["image"]}} for record, jpeg in photographs]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet", row_group_size=100)
        return folder / "data.parquet"
    for record, jpeg in photographs:
        (folder / record["image"]).write_bytes(jpeg)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def photographs_as_jpeg(number: int) -> Iterator[bytes]:
    """Smooth shapes with some grain, 1024 x 768: their files are as large as photographs', and as slow to decode."""
    generator = np.random.default_rng(0)
    for _ in range(number):
        shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((1024, 768), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()


def mgm_2b_processor() -> MGMProcessor:
    """MGM-2B's views of an image, 768 and 336 pixels in patches of 14, with the tiny model's tokenizer."""
    tiny = load_processor("data/tiny_mgm")
    sizes = {"size": {"shortest_edge": 768}, "crop_size": {"height": 768, "width": 768}}
    image_processor = type(tiny.image_processor).from_dict({**tiny.image_processor.to_dict(), **sizes})
    return MGMProcessor(image_processor, tiny.tokenizer, image_size=336, patch_size=14)


def soak(path: Path, num_workers: int, config: LoaderConfig) -> dict:
    """Load for `config.seconds`, epoch after epoch. Returns images a second, and the resident bytes at each of MARKS.

    On a busy machine a worker has less than a core: `cpu_seconds_per_image` does not depend on that.
    """
    processor, dataset = mgm_2b_processor(), open_dataset(path)
    records = dataset.records = measure_lengths(dataset.records, processor, 2048)
    lengths = column_values(records, "num_label_tokens"), column_values(records, "num_tokens")
    sampler = UpdateBatchSampler(lengths[0], config.batch_size, 1, 1, seed=0, num_tokens=lengths[1])
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=TrainCollator(processor, 2048),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    batches = endless(loader, sampler)
    next(batches)  # workers are up, files are open
    start, cpu_start, num_images, memory = time.perf_counter(), cpu_seconds(), 0, []
    while len(memory) < len(MARKS):
        num_images += len(next(batches)["pixel_values"])
        if (seconds := time.perf_counter() - start) >= MARKS[len(memory)] * config.seconds:
            memory.append({"seconds": round(seconds, 1), **resident_memory()})
    return {
        "num_workers": num_workers,
        "images_per_second": round(num_images / seconds, 2),
        "images_per_second_per_worker": round(num_images / seconds / max(1, num_workers), 2),
        "cpu_seconds_per_image": round((cpu_seconds() - cpu_start) / num_images, 4),
        "memory": memory,
    }


def endless(loader: DataLoader, sampler: UpdateBatchSampler) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
        sampler.start_at(sampler.epoch + 1)


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far."""
    main_process = psutil.Process()
    times = [process.cpu_times() for process in (main_process, *main_process.children())]
    return sum(time.user + time.system for time in times)


def resident_memory() -> dict:
    """Bytes of this process and of each worker, pages they share counted in both."""
    main_process = psutil.Process()
    workers = [child.memory_info().rss for child in main_process.children()]
    return {"main_rss_bytes": main_process.memory_info().rss, "workers_rss_bytes": workers}


if __name__ == "__main__":
    run_script(main, LoaderConfig)
