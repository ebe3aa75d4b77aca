"""MGM for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7), so that its tasks run on it:

    python -m evaluation.lmms_eval_mgm --model mgm --model_args pretrained=mgm-2b --tasks textvqa_val --batch_size 16

The class is written as lmms-eval has its own in lmms_eval/models/chat/; what follows it makes it known to a copy that
lacks it. lmms-eval needs torchvision and much else: give it an environment of its own (docs/lmms_eval.md).
"""

import time

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from chat.messages import IMAGE_TOKEN
from data.images import to_rgb
from models.adapter import load_adapter, load_trained_processor
from models.config import MIXED_PRECISIONS, resolve_mixed_precision
from models.generation import generate_tokens, prompt_inputs
from models.loading import check_is_no_preset, load_model


SPEAKERS = {"user": "human", "assistant": "gpt"}
MAX_NEW_TOKENS = 1024  # where a task sets none, as lmms-eval's other models


@register_model("mgm")
class MGM(lmms):
    """Mini-Gemini (MGM): greedy answers to one turn or several that are given. Images only.

    Args:
        pretrained: folder or hub id, as `eval.py --model`.
        adapter: folder of a PEFT adapter.
        batch_size: requests that each process answers at once.
        mixed_precision: as `eval.py --mixed_precision`.
        attn_implementation: as `eval.py --attn_implementation`.
        device: lmms-eval hands it over; accelerate chooses.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "data/tiny_mgm",
        adapter: str | None = None,
        batch_size: int | str = 1,
        mixed_precision: str = "auto",
        attn_implementation: str = "sdpa",
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_is_no_preset(pretrained)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        dtype = MIXED_PRECISIONS[resolve_mixed_precision(mixed_precision)]
        model = load_model(pretrained, dtype, attn_implementation)
        if adapter is not None:
            model = load_adapter(model, adapter)
        self._model = self.accelerator.prepare_model(model, evaluation_mode=True).eval()
        self.processor = load_trained_processor(pretrained, adapter)
        self.batch_size_per_gpu = int(batch_size)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    @property
    def model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self._model)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request, cut where one of its `until` strings begins."""
        # Those with the same settings share batches, the longest prompts first.
        ordered = utils.Collator(
            [request.args for request in requests],
            lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results: list[GenerationResult] = []
        elapsed = 0.0
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for batch in ordered.get_batched(n=self.batch_size):
            contexts, doc_to_messages, settings, doc_ids, tasks, splits = zip(*batch, strict=True)
            docs = [self.task_dict[task][split][i] for task, split, i in zip(tasks, splits, doc_ids, strict=True)]
            prompts = [
                to_prompt(ChatMessages(messages=read(doc))) for read, doc in zip(doc_to_messages, docs, strict=True)
            ]
            start = time.time()
            answered = self._answer(prompts, settings[0])
            elapsed += time.time() - start
            for context, result in zip(contexts, answered, strict=True):
                self.cache_hook.add_partial("generate_until", (context, settings[0]), result.text)
            results += answered
            progress.update(len(batch))
        progress.close()
        num_tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(
            total_gen_tokens=num_tokens,
            total_elapsed_time=elapsed,
            avg_speed=num_tokens / elapsed if elapsed else 0,
            additional_metrics={"rank": self.rank},
        )
        return ordered.get_original(results)

    def _answer(self, prompts: list[tuple], settings: dict) -> list[GenerationResult]:
        turns, images = map(list, zip(*prompts, strict=True))
        inputs = prompt_inputs(self.processor, turns, images).to(self.device)
        tokens = generate_tokens(self.model, inputs, settings.get("max_new_tokens", MAX_NEW_TOKENS))
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        counts = (tokens != self.tokenizer.pad_token_id).sum(1).tolist()
        return [
            GenerationResult(text=cut_at(text, settings.get("until")), token_counts=TokenCounts(output_tokens=count))
            for text, count in zip(texts, counts, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("MGM answers in lmms-eval by generating: choose a task of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("MGM answers one round in lmms-eval")


def to_prompt(messages: ChatMessages) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """LLaVA's turns up to the reply, and the images. MGM knows no system turn: its text opens the first question.

    Raises:
        ValueError: a video or audio is among the messages.
    """
    images, videos, audios = messages.extract_media()
    if videos or audios:
        raise ValueError("the task has videos or audio, and MGM takes images alone")
    system, turns = [], []
    for message in messages.messages:
        # The placeholders are the images', whatever the task's text says.
        parts = [
            IMAGE_TOKEN if part.type == "image" else part.text.replace(IMAGE_TOKEN, "") for part in message.content
        ]
        if message.role == "system":
            system += parts
        else:
            turns.append({"from": SPEAKERS[message.role], "value": "\n".join([*system, *parts])})
            system = []
    return turns, [to_rgb(image if isinstance(image, Image.Image) else Image.open(image)) for image in images]


def cut_at(text: str, until: str | list[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or []:
        if end.strip():
            text = text.split(end)[0]
    return text


MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id="mgm", chat_class_path="evaluation.lmms_eval_mgm.MGM"))


if __name__ == "__main__":
    cli_evaluate()
