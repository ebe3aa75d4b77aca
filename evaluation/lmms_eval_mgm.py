"""MGM for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7), so that its tasks run on it:

    python -m evaluation.lmms_eval_mgm --model mgm --model_args pretrained=mgm-2b --tasks textvqa_val --batch_size 16

lmms-eval needs torchvision and much else: give it an environment of its own (docs/lmms_eval.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm

from data.images import to_rgb
from models.adapter import load_adapter, load_trained_processor
from models.config import MIXED_PRECISIONS, resolve_mixed_precision
from models.generation import generate_answers, prompt_inputs
from models.loading import load_model


@register_model("mgm")
class MGM(lmms):
    """Greedy answers, one turn, images only.

    Args:
        pretrained: folder or hub id, as `eval.py --model`.
        adapter: folder of a PEFT adapter.
    """

    def __init__(
        self,
        pretrained: str = "data/tiny_mgm",
        adapter: str | None = None,
        batch_size: int | str = 1,
        mixed_precision: str = "auto",
        attn_implementation: str = "sdpa",
        device: str | None = None,  # lmms-eval hands it over; accelerate chooses
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        dtype = MIXED_PRECISIONS[resolve_mixed_precision(mixed_precision)]
        model = load_model(pretrained, dtype, attn_implementation)
        if adapter is not None:
            model = load_adapter(model, adapter)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True).eval()
        self.processor = load_trained_processor(pretrained, adapter)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request, cut where one of its `until` strings begins."""
        # Those with the same settings share batches, the longest prompts first.
        ordered = Collator([request.args for request in requests], lambda args: -len(args[0]), grouping=True)
        answers = []
        for batch in tqdm(ordered.get_batched(n=self.batch_size), desc="Answering", disable=self.rank != 0):
            answers += self._answer([self._prompt(*request) for request in batch], batch[0][1])
        return ordered.get_original(answers)

    def _prompt(
        self,
        context: str,
        _settings: dict[str, Any],
        doc_to_visual: Callable[[Any], list | None],
        doc_id: int,
        task: str,
        split: str,
    ) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """The conversation up to the reply, and its images, which come first whatever the task's text says."""
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"task {task} has visuals that are not images, and MGM takes images alone")
        text = "<image>\n" * len(images) + context.replace("<image>", "").strip()
        return [{"from": "human", "value": text}], [to_rgb(image) for image in images]

    def _answer(self, prompts: list[tuple], settings: dict[str, Any]) -> list[str]:
        conversations, images = map(list, zip(*prompts, strict=True))
        inputs = prompt_inputs(self.processor, conversations, images).to(self.model.device)
        found = generate_answers(self.model, self.processor, inputs, settings.get("max_new_tokens", 128))
        answers = [answer.text for answer in found]
        until = settings.get("until", [])
        for end in [until] if isinstance(until, str) else until:
            answers = [answer.split(end)[0] if end.strip() else answer for answer in answers]
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("MGM answers in lmms-eval by generating: choose a task of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("MGM answers one turn in lmms-eval")


MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id="mgm", simple_class_path="evaluation.lmms_eval_mgm.MGM"))


if __name__ == "__main__":
    cli_evaluate()
