"""The README of a saved adapter or model, in the hub's format: its base, how it was trained, its scores."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from utils import GIB, markdown_table


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
USE = {
    True: """\
```python
import torch
from peft import PeftModel
from models.loading import load_model, load_processor

model = PeftModel.from_pretrained(load_model("{model}", torch.bfloat16, "sdpa"), "{folder}")
processor = load_processor("{folder}")
```""",
    False: """\
```python
import torch
from models.loading import load_model, load_processor

model = load_model("{folder}", torch.bfloat16, "sdpa")
processor = load_processor("{folder}")
```""",
}


def build_model_card(run: dict) -> ModelCard:
    """The card of a finished run, from what run.json holds."""
    config = run["config"]
    folder = Path(config["output_dir"])
    kind = "A LoRA adapter for" if config["lora_r"] else "A fine-tuned"
    trained, total = run["trainable_params"], run["total_params"]
    peaks = ", ".join(f"{phase} {peak / GIB:.2f} GiB" for phase, peak in run["peak"].items())
    body = [
        f"# {folder.name}",
        f"{kind} `{config['model']}`, a Mini-Gemini (MGM) vision-language model. "
        f"{trained:,} of {total:,} parameters ({trained / total:.2%}) were trained.",
        "## Use",
        USE[config["lora_r"] > 0].format(model=config["model"], folder=folder),
        "## Data",
        f"`{config['dataset'] or 'the embedded demo'}`, {run['global_step']:,} updates, "
        f"training loss {run['train_loss']:.3f}.{describe_cut(run)}",
        "## Scores",
        describe_scores(run["eval"]),
        "## Memory",
        f"Peak on {run['environment']['device']}: {peaks}.",
        "## Settings",
        markdown_table(["flag", "value"], config.items()),
        "## Versions",
        markdown_table(["what", "value"], run["environment"].items()),
    ]
    return ModelCard(f"---\n{metadata(run, folder.name).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def metadata(run: dict, name: str) -> ModelCardData:
    """What the hub searches by. It accepts hub ids only; a local folder's name appears in the text alone."""
    config = run["config"]
    return ModelCardData(
        model_name=name,
        base_model=hub_id(config["model"]),
        datasets=[hub_id(config["dataset"])] if hub_id(config["dataset"]) else None,
        library_name="peft" if config["lora_r"] else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["mgm", "mini-gemini", *(["lora"] if config["lora_r"] else [])],
        eval_results=eval_results(run),
    )


def eval_results(run: dict) -> list[EvalResult] | None:
    if "exact_match" not in run["eval"]:
        return None
    data = run["config"]["eval_dataset"] or run["config"]["dataset"] or "demo"
    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=data,
            dataset_name=Path(data).name,
            metric_type="exact_match",
            metric_value=run["eval"]["exact_match"],
        )
    ]


def hub_id(name: str | None) -> str | None:
    """The name if it is a hub id, not a folder or file."""
    is_hub_id = name is not None and HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_hub_id else None


def describe_cut(run: dict) -> str:
    """A sentence about samples that were cut, if there are any."""
    if not (num_cut := run.get("cut_replies", 0)):
        return ""
    length = run["config"]["max_seq_len"]
    return f" Samples cut off at {length} tokens, so that the end of their replies was not learned: {num_cut:,}."


def describe_scores(scores: dict[str, float]) -> str:
    """After a resume with another --eval_samples a score may be missing, or the two may be of different samples."""
    words = {"exact_match_before": "before", "exact_match": "after"}
    parts = [f"{scores[key]:.1%} {word}" for key, word in words.items() if key in scores]
    if not parts:
        return "Not evaluated."
    samples = f"{scores['n']} samples"
    if "n_before" in scores:
        samples = f"{scores['n_before']} samples before, {scores['n']} after"
    return f"Held-out exact match: {', '.join(parts)} ({samples})."
