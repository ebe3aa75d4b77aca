"""Answer a benchmark's questions, score the answers, and compare two such runs.

    python eval.py --adapter outputs/demo
    python eval.py --model mgm-2b --task textvqa --dataset TextVQA_0.5.1_val.json --image_folder train_images
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 eval.py --model mgm-2b
    python eval.py --compare full.json lora.json

Answers are greedy. They are written as they come, and the same command goes on where an interrupted one stopped. The
last line on stdout is a JSON object. `tensorboard --logdir outputs/eval` lays runs side by side.
"""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import ProcessorMixin

from adapter import base_of, check_base, load_adapter, load_trained_processor
from chunked_loss import IGNORE_INDEX
from comparison import as_table, compare_files
from data.dataset import ConversationDataset
from data.worst_case import Row
from eval_log import AnswersFile
from eval_pictures import write_tensorboard
from generation import Answer, answer_batches
from tasks import captions, conversations, mmbench, textvqa
from tasks.task import Question, Task, by_type, mean_score
from tasks.textvqa_score import textvqa_score  # noqa: F401 (part of this script's interface)
from utils import (
    MIXED_PRECISIONS,
    ModelConfig,
    UserError,
    check_choice,
    check_minimum,
    load_model,
    run_script,
)


TASKS = ("demo", "textvqa", "mmbench", "caption")
NOT_SETTINGS = ("batch_size", "follow_links", "dataloader_num_workers", "output", "compare")  # they change no answer


@dataclass(kw_only=True)
class EvalConfig(ModelConfig):
    model: str | None = field(
        default=None, metadata={"help": "folder or hub id; default: the adapter's base, else data/tiny_mgm"}
    )
    adapter: str | None = field(default=None, metadata={"help": "folder of a PEFT adapter for the model"})
    task: str = field(default="demo", metadata={"help": " | ".join(TASKS)})
    dataset: str | None = field(default=None, metadata={"help": "the benchmark's own file; the demo's for the demo"})
    image_folder: str | None = field(default=None, metadata={"help": "default: the folder of the data set"})
    follow_links: bool = field(default=False, metadata={"help": "allow links out of the image folder"})
    batch_size: int = field(default=32, metadata={"help": "questions a process answers at once; changes no answer"})
    max_new_tokens: int = field(default=128, metadata={"help": "the longest answer, in tokens"})
    limit: int = field(default=0, metadata={"help": "answer the first questions only; 0: all"})
    ocr_file: str | None = field(
        default=None, metadata={"help": "textvqa: words for the prompt, Rosetta's .json or LLaVA's prompts .jsonl"}
    )
    circular: bool = field(default=False, metadata={"help": "mmbench: right in every rotation of the options"})
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that open images ahead"})
    output: str | None = field(default=None, metadata={"help": "FILE.json; default outputs/eval/TASK.json"})
    compare: list[str] | None = field(
        default=None, metadata={"help": "FULL.json LORA.json: two runs' scores on the same questions"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            self.model = base_of(self.adapter) if self.adapter else ModelConfig.model
        elif self.adapter:
            check_base(self.adapter, self.model)
        check_choice("task", self.task, TASKS)
        check_minimum(self, batch_size=1, max_new_tokens=1, limit=0, dataloader_num_workers=0)
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
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output} is there already: choose another, or delete it to evaluate again")
    accelerator = build_accelerator(config)
    with accelerator.main_process_first():
        task = load_task(config)
    processor = load_trained_processor(config.model, config.adapter)
    model = build_model(accelerator, config)

    start = time.perf_counter()
    answers = answer_all(accelerator, model, processor, task.questions, config)
    if not accelerator.is_main_process:
        return None
    scores = task.score(answers)
    result = {
        "task": config.task,
        "metric": task.metric,
        "score": mean_score(scores),
        "n": len(scores),
        "seconds": time.perf_counter() - start,
        "predictions": str(config.predictions),
    }
    details = {"by_type": by_type(scores), "scores": [asdict(score) for score in scores], "config": asdict(config)}
    output.write_text(json.dumps(result | details, indent=1) + "\n")
    write_tensorboard(output.parent / "tensorboard" / output.stem, task.metric, task.questions, answers, scores)
    for kind, group in details["by_type"].items():
        print(f"{kind}: {group['score']:.3f} of {group['n']}")
    return result


def load_task(config: EvalConfig) -> Task:
    """The task's questions. Raises UserError for files that are not in its format, or hold no question."""
    if config.task == "mmbench":
        return mmbench.load(config.dataset, config.limit, config.circular)
    files = (config.dataset, config.image_folder, config.limit, config.follow_links)
    if config.task == "textvqa":
        return textvqa.load(*files, config.ocr_file)
    return captions.load(*files) if config.task == "caption" else conversations.load(*files)


def build_accelerator(config: EvalConfig) -> Accelerator:
    """The strategy is the launch config's, as in train.py."""
    on_cpu = not torch.cuda.is_available()
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    accelerator = Accelerator(
        cpu=on_cpu and not uses_deepspeed,
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and uses_deepspeed else [],
    )
    if uses_deepspeed:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    return accelerator


def build_model(accelerator: Accelerator, config: EvalConfig) -> nn.Module:
    """The model with its adapter, on its device. ZeRO-3 splits it only then: PEFT loads whole tensors."""
    plugin = accelerator.state.deepspeed_plugin
    with plugin.zero3_init_context_manager(enable=False) if plugin else nullcontext():
        model = load_model(config.model, MIXED_PRECISIONS[config.mixed_precision], config.attn_implementation)
        if config.adapter is not None:
            model = load_adapter(model, config.adapter)
    model = accelerator.prepare(model) if plugin else accelerator.prepare_model(model, evaluation_mode=True)
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
        file = AnswersFile(config.predictions, settings, questions)
    (answers,) = broadcast_object_list([file.answers if file else None])
    missing = [index for index in range(len(questions)) if index not in answers]
    sizes = (config.batch_size, config.max_new_tokens, config.dataloader_num_workers)
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


@dataclass(frozen=True)
class HeldOut:
    """What train.py asks before and after training: the first question of every held-out sample.

    `longest` is the largest row that answering can come to: prompt and answer.
    """

    questions: list[Question]
    batch_size: int
    max_new_tokens: int = 0
    longest: Row | None = None

    @classmethod
    def of(
        cls,
        dataset: ConversationDataset | None,
        processor: ProcessorMixin,
        batch_size: int,
        max_new_tokens: int | None = None,
        positions: float = math.inf,
    ) -> "HeldOut":
        """The samples of a data set, or none.

        Args:
            max_new_tokens: None: as many as the longest reply has, and as there is room for.
            positions: of the language model, for prompt and answer.

        Raises:
            UserError: the longest prompt leaves no room for an answer, or not for so many tokens.
        """
        questions = conversations.to_questions(dataset) if dataset is not None else []
        if not questions:
            return cls([], batch_size)
        prompts, replies = zip(*[num_tokens(processor, question) for question in questions], strict=True)
        room = positions - max(prompts)
        if room < (max_new_tokens or 1):
            asked = f"--max_new_tokens {max_new_tokens}" if max_new_tokens else "the held-out data"
            raise UserError(
                f"{asked}: the longest held-out prompt has {max(prompts)} tokens, and the language model {positions} "
                "positions for prompt and answer; choose less, or leave long prompts out"
            )
        longest_answer = max_new_tokens or min(max(replies), room)
        num_images = max(question.num_images for question in questions)
        return cls(questions, batch_size, longest_answer, Row(max(prompts) + longest_answer, num_images))

    @property
    def when(self) -> str:
        """They are answered, for a message."""
        return f"while answering held-out questions, {self.batch_size} at a time (--per_device_eval_batch_size)"


def num_tokens(processor: ProcessorMixin, question: Question) -> tuple[int, int]:
    """Tokens of the prompt, image positions counted, and of the reference with its end of turn."""
    reply = {"from": "gpt", "value": question.references[0]}
    _, labels = processor.tokenize([*question.conversation, reply])
    is_label = [label != IGNORE_INDEX for label in labels]
    return is_label.index(True) if any(is_label) else len(labels), sum(is_label)  # the prompt ends at the first label


@dataclass(frozen=True)
class Prediction:
    index: int  # of the sample in the data set
    id: str
    question: str
    answer: str
    prediction: str
    is_cut: bool  # the prediction had not ended

    @property
    def is_exact(self) -> bool:
        return conversations.is_exact(self.prediction, self.answer)


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    held_out: HeldOut,
) -> list[Prediction]:
    """Answer the questions, shared out among the processes. All of them get all predictions."""
    if not held_out.questions:
        return []
    was_training = model.training
    model.eval()
    answers: dict[int, Answer] = {}
    indices = list(range(len(held_out.questions)))
    sizes = (held_out.batch_size, held_out.max_new_tokens)
    for found in answer_batches(accelerator, model, processor, held_out.questions, indices, *sizes):
        answers |= found
    model.train(was_training)
    return [
        Prediction(i, question.id, question.prompt, question.references[0], answers[i].text, answers[i].is_cut)
        for i, question in enumerate(held_out.questions)
    ]


def exact_match(predictions: list[Prediction]) -> float:
    """The share of predictions that equal their reference, 0 to 1."""
    return sum(prediction.is_exact for prediction in predictions) / len(predictions)


if __name__ == "__main__":
    run_script(main, EvalConfig)
