"""MGM for VLMEvalKit (https://github.com/open-compass/VLMEvalKit), as a class of its vlmeval/vlm/.

VLMEvalKit's own Mini_Gemini runs MGM-7B-HD alone, by the original's code; this class runs every size in this project's
form, adapters too. docs/lmms_eval.md says how a checkout of VLMEvalKit learns of it.
"""

import string
from itertools import takewhile
from typing import Any

import pandas as pd
import torch
from vlmeval.dataset import DATASET_TYPE
from vlmeval.smp import cn_string
from vlmeval.vlm.base import BaseModel

from chat.messages import IMAGE_TOKEN
from data.images import read_rgb
from evaluation.tasks.mmbench import INSTRUCTION, is_none
from models.adapter import load_adapter, load_trained_processor
from models.config import MIXED_PRECISIONS, resolve_mixed_precision
from models.generation import generate_answers, prompt_inputs
from models.loading import check_is_no_preset, load_model


INSTRUCTION_CN = "请直接回答选项字母。"  # of the original's mgm/eval/model_vqa_mmbench.py, as INSTRUCTION


class MGM(BaseModel):
    """Mini-Gemini (MGM): greedy answers, images only; they come before the text.

    Args:
        model_path: folder or hub id, as `eval.py --model`.
        adapter: folder of a PEFT adapter.
        max_new_tokens: the longest answer.
    """

    INSTALL_REQ = True
    INTERLEAVE = True

    def __init__(
        self, model_path: str = "data/tiny_mgm", adapter: str | None = None, max_new_tokens: int = 1024
    ) -> None:
        super().__init__()
        check_is_no_preset(model_path)
        model = load_model(model_path, MIXED_PRECISIONS[resolve_mixed_precision("auto")], "sdpa")
        if adapter is not None:
            model = load_adapter(model, adapter)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.processor = load_trained_processor(model_path, adapter)
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Multiple choice has the original's words; the data set's own serve elsewhere."""
        return dataset is not None and DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: pd.Series, dataset: str | None = None) -> list[dict[str, str]]:
        """Hint, question, options and instruction, a line each."""
        hint = [] if is_none(line.get("hint")) else [str(line["hint"])]
        letters = takewhile(lambda letter: not is_none(line.get(letter)), string.ascii_uppercase)
        lines = [*hint, str(line["question"]), *(f"{letter}. {line[letter]}" for letter in letters)]
        lines.append(INSTRUCTION_CN if cn_string("\n".join(lines)) else INSTRUCTION)
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": "\n".join(lines)}]

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        paths = [part["value"] for part in message if part["type"] == "image"]
        text = "\n".join(part["value"].replace(IMAGE_TOKEN, "") for part in message if part["type"] == "text")
        turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n" * len(paths) + text}]
        images = [read_rgb(path) for path in paths]
        inputs = prompt_inputs(self.processor, [turns], [images]).to(self.model.device)
        (answer,) = generate_answers(self.model, self.processor, inputs, self.max_new_tokens)
        return answer.text
