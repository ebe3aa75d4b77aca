"""Answer held-out questions and score the answers: greedy generation, exact match."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from data.dataset import ConversationDataset
from processing_mgm import IMAGE_TOKEN


@dataclass(frozen=True)
class Prediction:
    index: int  # of the sample in the data set
    id: str
    question: str
    answer: str
    prediction: str

    @property
    def is_exact(self) -> bool:
        return normalize(self.prediction) == normalize(self.answer)


def normalize(text: str) -> str:
    """Exact match is blind to case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").casefold()


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    dataset: ConversationDataset | None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> list[Prediction]:
    """Answer the first question of every sample, shared out among the processes. All of them get all predictions."""
    if dataset is None:
        return []
    was_training = model.training
    model.eval()
    indices = list(range(len(dataset)))
    predictions = []
    # Padded with repetitions: under ZeRO-3 every process has to generate as often as the others.
    with accelerator.split_between_processes(indices, apply_padding=True) as own:
        batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=not accelerator.is_main_process):
            samples = [dataset[index] for index in batch]
            answers = generate_answers(accelerator, model, processor, samples, max_new_tokens)
            predictions += [
                Prediction(index, sample["id"], question(sample), reference(sample), answer)
                for index, sample, answer in zip(batch, samples, answers, strict=True)
            ]
    model.train(was_training)
    by_index = {prediction.index: prediction for prediction in gather_object(predictions)}
    return [by_index[index] for index in indices]


@torch.no_grad()
def generate_answers(
    accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, samples: list[dict], max_new_tokens: int
) -> list[str]:
    """Greedy answers to the first question of each sample."""
    inputs = processor(
        conversations=[sample["conversations"][:1] for sample in samples],
        images=[sample["images"] for sample in samples],
        add_generation_prompt=True,
        padding_side="left",
    ).to(accelerator.device)
    del inputs["labels"]
    with accelerator.autocast():
        generated = accelerator.unwrap_model(model).generate(
            **inputs, do_sample=False, use_cache=True, max_new_tokens=max_new_tokens
        )
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def question(sample: dict) -> str:
    return sample["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip()


def reference(sample: dict) -> str:
    return sample["conversations"][1]["value"]


def exact_match(predictions: list[Prediction]) -> float:
    """The share of predictions that equal their reference, 0 to 1."""
    return sum(prediction.is_exact for prediction in predictions) / len(predictions)
