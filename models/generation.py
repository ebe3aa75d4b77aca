"""Greedy answers to a batch of prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import BatchFeature, ProcessorMixin

from chat.encoding import encode
from chat.messages import messages_for


def prompt_inputs(
    processor: ProcessorMixin, prompts: list[list[dict[str, str]]], images: list[list[Image.Image]]
) -> BatchFeature:
    """Conversations up to the next reply, padded on the left so that every row ends where its answer begins."""
    conversations = [messages_for(processor, prompt) for prompt in prompts]
    inputs = encode(processor, conversations, images, add_generation_prompt=True, padding_side="left")
    del inputs["labels"]
    return inputs


@dataclass(frozen=True)
class Answer:
    text: str
    is_cut: bool  # max_new_tokens came before an end token


def generate_answers(
    model: nn.Module, processor: ProcessorMixin, inputs: BatchFeature, max_new_tokens: int
) -> list[Answer]:
    """An answer to each prompt of a batch."""
    tokens = generate_tokens(model, inputs, max_new_tokens)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    ended = torch.isin(tokens, tokens.new_tensor(end_tokens(model))).any(1).tolist()
    return [Answer(text, is_cut=not has_ended) for text, has_ended in zip(texts, ended, strict=True)]


@torch.no_grad()  # not inference_mode: a prediction traces this function, and cannot replace operators under that
def generate_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
    """Greedy decoding up to one of `end_tokens`. Returns the new tokens [B, N].

    Images are encoded once, with the prompt; later steps read the key-value cache.
    """
    generated = model.generate(**inputs, do_sample=False, use_cache=True, max_new_tokens=max_new_tokens)
    return generated[:, inputs["input_ids"].shape[1] :]


def answer_worst_case(accelerator: Accelerator, model: nn.Module, questions: Mapping[str, torch.Tensor]) -> None:
    """Run the passes that need the most memory: over the prompts of worst_case_questions, and with their cache."""
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        generate_tokens(accelerator.unwrap_model(model), questions, max_new_tokens=2)
    model.train(was_training)


def end_tokens(model: nn.Module) -> list[int]:
    """The tokens that end an answer, by the model's generation config."""
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else found or []
