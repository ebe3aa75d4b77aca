"""Greedy answers: a batch of prompts at a time, shared out among the processes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchFeature, ProcessorMixin

from data.sharing import SharingCollator
from tasks.task import Question


def prompt_inputs(
    processor: ProcessorMixin, prompts: list[list[dict[str, str]]], images: list[list[Image.Image]]
) -> BatchFeature:
    """Conversations that wait for a reply, padded on the left so that every row goes on where it ends."""
    inputs = processor(conversations=prompts, images=images, add_generation_prompt=True, padding_side="left")
    del inputs["labels"]
    return inputs


@dataclass(frozen=True)
class Answer:
    text: str
    is_cut: bool  # it had not ended after as many tokens as were allowed


def generate_answers(
    model: nn.Module, processor: ProcessorMixin, inputs: BatchFeature, max_new_tokens: int
) -> list[Answer]:
    """An answer to each prompt of a batch."""
    tokens = generate_tokens(model, inputs, max_new_tokens)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    ended = torch.isin(tokens, tokens.new_tensor(end_tokens(model))).any(1).tolist()
    return [Answer(text, is_cut=not has_ended) for text, has_ended in zip(texts, ended, strict=True)]


@torch.no_grad()  # not inference_mode: a prediction traces this function, and has no say in what runs under that
def generate_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
    """The likeliest next token again and again, up to one of `end_tokens`. Returns the new tokens [B, N].

    Images are encoded once, with the prompt; the cache holds the rest.
    """
    generated = model.generate(**inputs, do_sample=False, use_cache=True, max_new_tokens=max_new_tokens)
    return generated[:, inputs["input_ids"].shape[1] :]


def answer_worst_case(accelerator: Accelerator, model: nn.Module, questions: Mapping[str, torch.Tensor]) -> None:
    """What answering takes at most, for worst_case_questions: a pass over the prompts, and one with their cache."""
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        generate_tokens(accelerator.unwrap_model(model), questions, max_new_tokens=2)
    model.train(was_training)


def end_tokens(model: nn.Module) -> list[int]:
    """The tokens that end an answer: the model's own."""
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else found or []


class QuestionBatches(torch.utils.data.Dataset):
    """The questions of one process as ready batches: images are opened in a loader's workers."""

    def __init__(self, processor: ProcessorMixin, questions: list[Question], batches: list[list[int]]) -> None:
        self.processor, self.questions, self.batches = processor, questions, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> BatchFeature:
        questions = [self.questions[i] for i in self.batches[index]]
        images = [question.images() for question in questions]
        return prompt_inputs(self.processor, [question.conversation for question in questions], images)


def as_it_is(batch: BatchFeature) -> BatchFeature:
    return batch


def answer_batches(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    indices: list[int],
    batch_size: int,
    max_new_tokens: int,
    num_workers: int = 0,
) -> Iterator[dict[int, Answer]]:
    """Answers to the questions with these indices, a batch of every process at a time, to all processes.

    The longest prompts come first: there is little padding, and memory runs out at once or never. Every process takes
    part in every batch, if need be with a question that another has too: under ZeRO-3 they have to run in step.
    """
    order = sorted(indices, key=lambda index: len(questions[index].prompt), reverse=True)
    step = batch_size * accelerator.num_processes
    shared = [order[start : start + step] for start in range(0, len(order), step)]
    own = [batch[accelerator.process_index :: accelerator.num_processes] or batch[:1] for batch in shared]
    batches = QuestionBatches(processor, questions, own)
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=SharingCollator(as_it_is))
    unwrapped = accelerator.unwrap_model(model)
    progress = tqdm(total=len(order), desc="Answering", unit="question", disable=not accelerator.is_main_process)
    with progress:
        for batch, inputs in zip(own, loader, strict=True):
            with accelerator.autocast():
                answers = generate_answers(unwrapped, processor, inputs.to(accelerator.device), max_new_tokens)
            found = dict(gather_object(list(zip(batch, answers, strict=True))))
            progress.update(len(found))
            yield found
