"""Answer a benchmark's questions, score the answers, and compare two such runs.

    python eval.py --adapter outputs/demo
    python eval.py --model mgm-2b --task textvqa --dataset TextVQA_0.5.1_val.json --image_folder train_images
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 eval.py --model mgm-2b
    python eval.py --compare full.json lora.json

Answers are greedy. They are written as they come, and the same command goes on where an interrupted one stopped. The
last line on stdout is a JSON object. `tensorboard --logdir outputs/eval` lays runs side by side.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import ProcessorMixin

from evaluation.answer import answer_batches
from evaluation.answers_file import AnswersFile, weights_stamp
from evaluation.comparison import as_table, compare_files
from evaluation.pictures import write_tensorboard
from evaluation.tasks import captions, conversations, mmbench, textvqa
from evaluation.tasks.task import Question, Task, by_type, mean_score
from evaluation.tasks.textvqa_score import textvqa_score  # noqa: F401 (part of this script's interface)
from models.adapter import base_of, check_base, load_adapter, load_trained_processor
from models.config import MIXED_PRECISIONS, ModelConfig, find_tiny_mgm
from models.loading import load_model
from step import build_accelerator, prepare
from utils import UserError, check_choice, check_minimum, check_writable, flag, run_script, write_json


TASKS = ("demo", "textvqa", "mmbench", "caption")
NOT_SETTINGS = ("batch_size", "follow_links", "dataloader_num_workers", "output", "compare")  # they change no answer


@dataclass(kw_only=True)
class EvalConfig(ModelConfig):
    model: str | None = flag(None, "folder or hub id; default: the adapter's base, else data/tiny_mgm")
    adapter: str | None = flag(None, "folder of a PEFT adapter for the model")
    task: str = flag("demo", " | ".join(TASKS))
    dataset: str | None = flag(None, "the benchmark's own file; default: for the task demo the demo's")
    image_folder: str | None = flag(None, "folder that image names start from; default: the data set's own")
    follow_links: bool = flag(False, "allow links out of the image folder")
    batch_size: int = flag(32, "questions that each process answers at once; changes no answer")
    max_new_tokens: int = flag(128, "the longest answer, in tokens")
    max_image_pixels: int = flag(0, "shrink larger images to so many pixels, as in training; 0: as the processor does")
    limit: int = flag(0, "answer only so many questions, the first; 0: all")
    ocr_file: str | None = flag(None, "for textvqa: words for the prompt, Rosetta's .json or LLaVA's prompts .jsonl")
    circular: bool = flag(False, "for mmbench: an answer counts if it is right in every rotation of the options")
    dataloader_num_workers: int = flag(2, "processes that open images ahead")
    output: str | None = flag(None, "file to write, NAME.json; default: outputs/eval/TASK.json")
    compare: list[str] | None = flag(None, "only compare two runs on the same questions: FULL.json LORA.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task", self.task, TASKS)
        check_minimum(self, batch_size=1, max_new_tokens=1, max_image_pixels=0, limit=0, dataloader_num_workers=0)
        if self.compare is not None and len(self.compare) != 2:
            raise UserError(f"--compare {' '.join(self.compare)}: give two files, FULL.json LORA.json")
        for name, task in (("ocr_file", "textvqa"), ("circular", "mmbench")):
            if getattr(self, name) and self.task != task:
                raise UserError(f"--{name}: --task {self.task} does not use it, {task} does")
        if self.output is None:
            self.output = f"outputs/eval/{self.task}.json"
        elif not self.output.endswith(".json"):
            raise UserError(f"--output {self.output}: give a file that ends in .json")

    @property
    def predictions(self) -> Path:
        return Path(self.output).with_suffix(".predictions.jsonl")


def main(config: EvalConfig) -> dict | None:
    if config.compare is not None:
        result = compare_files(*config.compare)
        print(as_table(result))
        return result
    config.model = model_of(config.model, config.adapter)
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output} is there already: choose another, or delete it to evaluate again")
    check_writable("output", output.parent)
    accelerator = build_accelerator(config.mixed_precision, config.batch_size)
    with accelerator.main_process_first():
        task = load_task(config)
    processor = load_trained_processor(config.model, config.adapter)
    model = prepare_model(accelerator, config)

    start = time.perf_counter()
    answers = answer_all(accelerator, model, processor, task.questions, config)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    scores = task.score(answers)
    result = {
        "task": config.task,
        "metric": task.metric,
        "score": mean_score(scores),
        "n": len(scores),
        "seconds": time.perf_counter() - start,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "predictions": str(config.predictions),
    }
    details = {"by_type": by_type(scores), "scores": [asdict(score) for score in scores], "config": asdict(config)}
    write_json(output, result | details)
    write_tensorboard(output.parent / "tensorboard" / output.stem, task.metric, task.questions, answers, scores)
    for kind, group in details["by_type"].items():
        print(f"{kind}: {group['score']:.3f} of {group['n']}")
    return result


def model_of(model: str | None, adapter: str | None) -> str:
    """`--model`, or what `--adapter` was trained on. Raises UserError where they do not belong together."""
    if adapter is None:
        return model or find_tiny_mgm(ModelConfig.model)
    if model is not None:
        check_base(adapter, model)
    return model or find_tiny_mgm(base_of(adapter))


def load_task(config: EvalConfig) -> Task:
    """The task's questions. Raises UserError for files that are not in its format, or hold no question."""
    if config.task == "mmbench":
        return mmbench.load(config.dataset, config.limit, config.circular)
    files = (config.dataset, config.image_folder, config.limit, config.follow_links)
    if config.task == "textvqa":
        return textvqa.load(*files, config.ocr_file)
    return captions.load(*files) if config.task == "caption" else conversations.load(*files)


def prepare_model(accelerator: Accelerator, config: EvalConfig) -> nn.Module:
    """The model with its adapter, on its device. ZeRO-3 splits it afterwards: PEFT loads unsharded tensors."""
    plugin = accelerator.state.deepspeed_plugin
    splits_weights = plugin is not None and plugin.zero_stage == 3
    with plugin.zero3_init_context_manager(enable=False) if plugin else nullcontext():
        model = load_model(config.model, MIXED_PRECISIONS[config.mixed_precision], config.attn_implementation)
        if config.adapter is not None:
            model = load_adapter(model, config.adapter)
    if accelerator.is_fsdp2:  # accelerate asks for an optimizer
        model, _ = prepare(accelerator, model, torch.optim.SGD(model.parameters()))
    elif splits_weights:
        model = accelerator.prepare(model)
    else:
        model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    model.eval()
    return model


def answer_all(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    config: EvalConfig,
) -> list[str]:
    """An answer to each question, those of an interrupted run included."""
    file = None
    if accelerator.is_main_process:
        settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
        settings["weights_file"] = weights_stamp(config.model, config.adapter)
        file = AnswersFile(config.predictions, settings, questions)
    (answers,) = broadcast_object_list([file.answers if file else None])
    missing = [index for index in range(len(questions)) if index not in answers]
    sizes = (config.batch_size, config.max_new_tokens, config.max_image_pixels, config.dataloader_num_workers)
    num_cut = 0
    for found in answer_batches(accelerator, model, processor, questions, missing, *sizes):
        num_cut += sum(answer.is_cut for answer in found.values())
        texts = {index: answer.text for index, answer in found.items()}
        answers |= texts
        if file:
            file.write(texts)
    if file:
        file.close()
    if num_cut:
        accelerator.print(
            f"{num_cut} of {len(missing)} answers had not ended after {config.max_new_tokens} tokens: "
            "choose a larger --max_new_tokens"
        )
    return [answers[index] for index in range(len(questions))]


if __name__ == "__main__":
    run_script(main, EvalConfig)
