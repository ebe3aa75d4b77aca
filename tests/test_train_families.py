"""train.py from the first to the last line on tiny models of many families, on images of many sizes and on text."""

import json
from pathlib import Path

import pytest
from forked_runs import run
from test_encoding import processor_of
from test_lengths import photo, records
from tiny_families import TRAINED, write_family

import train
from chat.encoding import num_image_tokens
from data.worst_case import Row
from utils import UserError


FLAGS = "--max_steps 3 --per_device_train_batch_size 2 --max_seq_len 400 --save_steps 0 --logging_steps 1 --lora_r 4"
FLAGS += " --dataloader_num_workers 0 --eval_samples 4 --max_new_tokens 3 --max_image_pixels 100000"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(photo(i))
    (tmp_path / "data.json").write_text(json.dumps(records()))
    return tmp_path / "data.json"


def only_text(path: Path) -> Path:
    kept = [record for record in json.loads(path.read_text()) if not record["image"]]
    path.write_text(json.dumps(kept))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_run(name: str, mixed: Path, tmp_path: Path) -> None:
    """Rehearsal, questions, three steps, saving, questions; the prediction beside it is that of the largest row."""
    write_family(name, tmp_path / "model", with_weights=True)
    data = only_text(mixed) if name == "llama" else mixed
    flags = f"{FLAGS} --model {tmp_path / 'model'} --dataset {data} --eval_dataset {data}"
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path / "logs")
    assert ended.code == 0, ended.err[-3000:]
    assert ended.result["status"] == "done" and ended.result["global_step"] == 3
    assert "Learned of record" in ended.out
    memory = json.loads((tmp_path / "out/run.json").read_text())["memory"]
    row = Row(**{key: memory["predicted_batch"][key] for key in ("num_tokens", "num_images", "image_size")})
    assert row.num_tokens <= 400 and (row.num_images > 0) == (name != "llama")
    if name == "qwen2_5_vl":
        assert tuple(row.image_size) == (640, 480), "the largest of all, before it is shrunk"
        assert num_image_tokens(processor_of(name), (365, 273)) <= row.num_tokens


def test_the_aspect_ratio_is_mgms(tmp_path: Path) -> None:
    """A family that has no such setting refuses the flag in one line."""
    write_family("llava", tmp_path / "model")
    config = train.TrainConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    assert train.build_processor(config).image_token == "<image>" and config.image_aspect_ratio is None
    config.image_aspect_ratio = "pad"
    with pytest.raises(UserError, match="--image_aspect_ratio pad: LlavaProcessor has no such setting, leave it out"):
        train.build_processor(config)
