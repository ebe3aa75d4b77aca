"""The README of a saved adapter or model, in the hub's format: its base, how it was trained, its scores."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from models.family import is_mgm
from models.loading import is_text_only
from utils import GIB, markdown_table


SMALLEST_SCORED = 1_000_000_000  # parameters: the tiny models of tests and demo answer no benchmark
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def build_model_card(run: dict, model_config: PreTrainedConfig) -> ModelCard:
    """The card of a finished run, from what run.json holds and the config of its model."""
    config = run["config"]
    folder = Path(config["output_dir"])
    kind = "A LoRA adapter for" if config["lora_r"] else "A fine-tuned"
    trained, total = run["trainable_params"], run["total_params"]
    peaks = ", ".join(f"{phase} {peak / GIB:.2f} GiB" for phase, peak in run["peak"].items())
    body = [
        f"# {folder.name}",
        f"{kind} `{config['model']}`, {describe_family(model_config)}. "
        f"{trained:,} of {total:,} parameters ({trained / total:.2%}) were trained.",
        "## Use",
        use(model_config, config["model"] if config["lora_r"] else None, folder),
        "## Data",
        f"`{config['dataset'] or 'the embedded demo'}`, {run['global_step']:,} updates, "
        f"training loss {run['train_loss']:.3f}.{describe_cut(run)}",
        "## Scores",
        describe_scores(run["eval"]),
        *(["## Benchmarks", benchmarks(config, folder)] if is_mgm(model_config) and total > SMALLEST_SCORED else []),
        "## Memory",
        f"Peak on {run['environment']['device']}: {peaks}.",
        "## Settings",
        markdown_table(["flag", "value"], config.items()),
        "## Versions",
        markdown_table(["what", "value"], run["environment"].items()),
    ]
    return ModelCard(f"---\n{metadata(run, folder.name, model_config).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def describe_family(model_config: PreTrainedConfig) -> str:
    if is_mgm(model_config):
        return "a Mini-Gemini (MGM) vision-language model"
    kind = "language" if is_text_only(model_config) else "vision-language"
    return f"a {kind} model of the type `{model_config.model_type}`"


def use(model_config: PreTrainedConfig, base: str | None, folder: Path) -> str:
    """Python that loads the model. `base`: what the adapter belongs to; None: the folder holds a whole model.

    MGM is a class of this project's; transformers has the others.
    """
    name = base or folder
    lines = ["import torch", *(["from peft import PeftModel"] if base else [])]
    if is_mgm(model_config):
        lines += ["from models.loading import load_model, load_processor", ""]
        loaded, processor = f'load_model("{name}", torch.bfloat16, "sdpa")', f'load_processor("{folder}")'
    else:
        is_text = is_text_only(model_config)
        model_class = "AutoModelForCausalLM" if is_text else "AutoModelForImageTextToText"
        processor_class = "AutoTokenizer" if is_text else "AutoProcessor"
        lines += [f"from transformers import {model_class}, {processor_class}", ""]
        loaded = f'{model_class}.from_pretrained("{name}", dtype=torch.bfloat16)'
        processor = f'{processor_class}.from_pretrained("{folder}")'
    lines += [f"model = {loaded}", *([f'model = PeftModel.from_pretrained(model, "{folder}")'] if base else [])]
    return "\n".join(["```python", *lines, f"processor = {processor}", "```"])


def metadata(run: dict, name: str, model_config: PreTrainedConfig) -> ModelCardData:
    """What the hub searches by. It accepts hub ids only; a local folder's name appears in the text alone."""
    config = run["config"]
    family = ["mgm", "mini-gemini"] if is_mgm(model_config) else [model_config.model_type]
    return ModelCardData(
        model_name=name,
        base_model=hub_id(config["model"]),
        datasets=[hub_id(config["dataset"])] if hub_id(config["dataset"]) else None,
        library_name="peft" if config["lora_r"] else "transformers",
        pipeline_tag="text-generation" if is_text_only(model_config) else "image-text-to-text",
        tags=[*family, *(["lora"] if config["lora_r"] else [])],
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


def benchmarks(config: dict, folder: Path) -> str:
    """How to score what was trained as the original was scored."""
    words = f"--model {config['model']} --adapter {folder}" if config["lora_r"] else f"--model {folder}"
    return (
        f"Not run. In this project's folder `python -m benchmarks.published {words} --folder benchmark_files` scores "
        "TextVQA and MMBench, beside the 56.2 and 59.8 that are published for MGM-2B. Its docs/evaluation.md says "
        "which files the command needs, and what memory and time it takes."
    )


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
