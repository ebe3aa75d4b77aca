"""Greedy answers: a batch of prompts at a time, shared out among the processes."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchFeature, ProcessorMixin

from tasks.task import Question


def prompt_inputs(
    processor: ProcessorMixin, prompts: list[list[dict[str, str]]], images: list[list[Image.Image]]
) -> BatchFeature:
    """Conversations that wait for a reply, padded on the left so that every row goes on where it ends."""
    inputs = processor(conversations=prompts, images=images, add_generation_prompt=True, padding_side="left")
    del inputs["labels"]
    return inputs


@torch.inference_mode()
def generate_answers(
    model: nn.Module, processor: ProcessorMixin, inputs: BatchFeature, max_new_tokens: int
) -> list[str]:
    """The likeliest next token again and again, up to the end of the turn: the end tokens are the model's own
    (`generation_config.eos_token_id`). Images are encoded once, with the prompt; the cache holds the rest."""
    generated = model.generate(**inputs, do_sample=False, use_cache=True, max_new_tokens=max_new_tokens)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class QuestionBatches(torch.utils.data.Dataset):
    """The questions of one process as ready batches: images are opened in a loader's workers."""

    def __init__(self, processor: ProcessorMixin, questions: list[Question], batches: list[list[int]]) -> None:
        self.processor, self.questions, self.batches = processor, questions, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> BatchFeature:
        questions = [self.questions[i] for i in self.batches[index]]
        images = [question.images() for question in questions]
        prompts = [question.conversation(len(opened)) for question, opened in zip(questions, images, strict=True)]
        return prompt_inputs(self.processor, prompts, images)


def answer_batches(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    indices: list[int],
    batch_size: int,
    max_new_tokens: int,
    num_workers: int = 0,
) -> Iterator[dict[int, str]]:
    """Answers to the questions with these indices, a batch of every process at a time, to all processes.

    The longest prompts come first: there is little padding, and memory runs out at once or never. Every process takes
    part in every batch, if need be with a question that another has too: under ZeRO-3 they have to run in step.
    """
    order = sorted(indices, key=lambda index: len(questions[index].prompt), reverse=True)
    step = batch_size * accelerator.num_processes
    shared = [order[start : start + step] for start in range(0, len(order), step)]
    own = [batch[accelerator.process_index :: accelerator.num_processes] or batch[:1] for batch in shared]
    loader = DataLoader(QuestionBatches(processor, questions, own), batch_size=None, num_workers=num_workers)
    unwrapped = accelerator.unwrap_model(model)
    progress = tqdm(total=len(order), desc="Answering", unit="question", disable=not accelerator.is_main_process)
    with progress:
        for batch, inputs in zip(own, loader, strict=True):
            with accelerator.autocast():
                answers = generate_answers(unwrapped, processor, inputs.to(accelerator.device), max_new_tokens)
            found = dict(gather_object(list(zip(batch, answers, strict=True))))
            progress.update(len(found))
            yield found
