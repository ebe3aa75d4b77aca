"""Answer many questions in batches that all processes share."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchFeature, ProcessorMixin

from chat.images import blank_image, shrink
from data.dummy_image import SIZE, needs_dummy_images
from data.sharing import share
from evaluation.tasks.task import Question
from models.generation import Answer, generate_answers, prompt_inputs


# Beside questions about text alone, where another process may have some about images.
LOOK = Question("", "What?", [""], images=lambda: [blank_image(SIZE)])


class QuestionBatches(torch.utils.data.Dataset):
    """The questions of one process as batches for the model. A loader's workers open the images."""

    def __init__(
        self,
        processor: ProcessorMixin,
        questions: list[Question],
        batches: list[list[int]],
        max_image_pixels: int,
        dummy_images: bool = False,
    ) -> None:
        """`dummy_images`: a batch without an image gets a question about one, behind the others."""
        self.processor, self.questions, self.batches = processor, questions, batches
        self.max_image_pixels, self.dummy_images = max_image_pixels, dummy_images

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> BatchFeature:
        questions = [self.questions[i] for i in self.batches[index]]
        if self.dummy_images and not any(question.num_images for question in questions):
            questions.append(LOOK)
        images = [[shrink(image, self.max_image_pixels) for image in question.images()] for question in questions]
        return prompt_inputs(self.processor, [question.conversation for question in questions], images)


def answer_batches(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    indices: list[int],
    batch_size: int,
    max_new_tokens: int,
    max_image_pixels: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[int, Answer]]:
    """Answer the questions with these indices, a batch per process at a time. Every process gets all answers.

    The longest prompts come first: there is little padding, and memory runs out at once or never. Every process takes
    part in every batch, if need be with a question that another has too: under ZeRO-3 they must run in step.
    """
    order = sorted(indices, key=lambda index: len(questions[index].prompt), reverse=True)
    step = batch_size * accelerator.num_processes
    shared = [order[start : start + step] for start in range(0, len(order), step)]
    own = [batch[accelerator.process_index :: accelerator.num_processes] or batch[:1] for batch in shared]
    num_images = [question.num_images for question in questions]
    dummy_images = needs_dummy_images(processor, num_images, accelerator.num_processes)
    batches = QuestionBatches(processor, questions, own, max_image_pixels, dummy_images)
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=share)
    unwrapped = accelerator.unwrap_model(model)
    progress = tqdm(total=len(order), desc="Answering", unit="question", disable=not accelerator.is_main_process)
    with progress:
        for batch, inputs in zip(own, loader, strict=True):
            with accelerator.autocast():
                answers = generate_answers(unwrapped, processor, inputs.to(accelerator.device), max_new_tokens)
            found = dict(gather_object(list(zip(batch, answers[: len(batch)], strict=True))))
            progress.update(len(found))
            yield found
