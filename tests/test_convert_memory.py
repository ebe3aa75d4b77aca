"""The peak memory of a conversion, on a checkpoint of MGM-2B's real size."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from conversion.names import rename_ours
from conversion.original_config import derive_original
from mgm.configuration_mgm import mgm_2b
from mgm.modeling_mgm import MGMForConditionalGeneration


SHARD_BYTES = 2 * 10**9  # less than a third of the model, so that one file and all of them differ
# What a process takes that has imported torch, transformers and PEFT, and built the model's modules.
LIBRARIES_BYTES = 1.2e9
ROOT = Path(__file__).parent.parent


def model_shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MGMForConditionalGeneration(mgm_2b())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def write_checkpoint(folder: Path, tokenizer: Path) -> tuple[int, int]:
    """MGM-2B in bf16 in the original's layout: every tensor begins with a number of its own, the rest are holes, which
    take no room on the disk. Returns the bytes of the largest shard and of all of them."""
    shards: list[dict[str, list[int]]] = [{}]
    used = 0
    for name, shape in model_shapes().items():
        if used + 2 * shape.numel() > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][rename_ours(name)] = list(shape)
        used += 2 * shape.numel()
    folder.mkdir()
    sizes, weight_map, number = [], {}, 0
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in sorted(shard.items()):
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in sorted(shard):
                number += 1
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(number.to_bytes(2, "little"))
            file.truncate(8 + len(text) + end)
        sizes.append(path.stat().st_size)
        weight_map |= dict.fromkeys(shard, path.name)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(derive_original(mgm_2b(), torch.bfloat16)))
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)
    return max(sizes), sum(sizes)


def write_adapter(folder: Path) -> None:
    """LoRA with r=16 on q, v and o, and projector and mining in full, all of it random."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in model_shapes().items():
        path = f"base_model.model.{name}"
        if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight")):
            stem = path.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, shape[1])
            tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 16)
        elif "projector" in name or "mining" in name:
            tensors[path] = torch.randn(shape)
    LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*\blanguage_model\..*\.(q_proj|v_proj|o_proj)",
        modules_to_save=["multi_modal_projector", "patch_info_mining"],
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def peak_rss(*flags: str) -> int:
    """Bytes of `ru_maxrss` of a conversion in a process of its own; pages of mapped files count."""
    process = subprocess.Popen([sys.executable, "convert_mgm.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    process.returncode = 0
    return usage.ru_maxrss * 1024


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep its 12 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_peak_memory(room, reference_folder):
    """The peak of MGM-2B's way to transformers and back with one shard, and of a merge with the model's bytes."""
    largest_shard, model_bytes = write_checkpoint(room / "original", reference_folder / "tiny_mgm_original")
    assert 1.8e9 < largest_shard < 2.1e9 and model_bytes > 6e9
    write_adapter(room / "adapter")
    peaks = {
        "ours": peak_rss("--from_original", f"{room}/original", "--output", f"{room}/ours"),
        "back": peak_rss("--to_original", f"{room}/ours", "--output", f"{room}/back"),
    }
    shutil.rmtree(room / "back")
    merge = ("--to_original", f"{room}/ours", "--adapter", f"{room}/adapter", "--output", f"{room}/back")
    peaks["merged"] = peak_rss(*merge)
    print({name: f"{peak / 1e9:.2f} GB" for name, peak in peaks.items()})
    assert max(peaks["ours"], peaks["back"]) <= largest_shard + LIBRARIES_BYTES < model_bytes
    assert peaks["merged"] <= model_bytes + LIBRARIES_BYTES
    for path in (room / "original").glob("*.safetensors"):
        assert (room / "back" / path.name).stat().st_size == path.stat().st_size
