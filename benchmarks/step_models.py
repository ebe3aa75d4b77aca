"""What the variants of benchmarks/step.py train: a model with random weights, its batch, the adapter's values."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GemmaConfig,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen3Config,
)

from data.worst_case import Row, full_rows
from layers.chunked_loss import IGNORE_INDEX
from layers.model_loss import head_of
from mgm.configuration_mgm import mgm_2b
from models.gather import gathered
from models.loading import is_text_only
from models.lora import trained_parameters
from models.parts import language_model
from models.presets import PRESETS
from step import StepConfig


Batch = dict[str, torch.Tensor]
NUM_BYTES = 256  # a preset's tokens below this number are ordinary ones
ADAPTER_SCALE = 0.02


@dataclass(frozen=True)
class BenchmarkModel:
    config: Callable[[], PreTrainedConfig]
    processor: Callable[[], ProcessorMixin] | None = None  # None: it reads text alone


@dataclass(frozen=True)
class Setting:
    model: str
    rows: int
    num_tokens: int  # of each row
    gradient_checkpointing: bool
    way: str  # step_ours.WAYS

    @property
    def team(self) -> tuple[str, int, bool, str]:
        """Settings of a team run in the same processes."""
        return self.model, self.rows, self.gradient_checkpointing, self.way


MODELS = {
    # Gemma-2B's proportions: an MLP eight times as wide as the hidden states, heads of 256, a tied head.
    "small": BenchmarkModel(
        lambda: GemmaConfig(
            vocab_size=65536,
            hidden_size=768,
            intermediate_size=6144,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=256,
        )
    ),
    "gemma-2b": BenchmarkModel(lambda: mgm_2b().text_config),
    "qwen3-1.7b": BenchmarkModel(
        lambda: Qwen3Config(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    ),
    **{
        name: BenchmarkModel(PRESETS[name].config, PRESETS[name].processor)
        for name in ("qwen3-vl-2b", "gemma-3-4b", "mgm-2b")
    },
}
OURS_ALONE = ("mgm-2b",)  # no other trainer has its class


def auto_class(config: PreTrainedConfig) -> type:
    return AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText


def write_model(name: str, folder: str, device: str, dtype: torch.dtype) -> None:
    """A folder as from the hub: config and random weights."""
    config = MODELS[name].config()
    torch.manual_seed(0)
    with torch.device(device):
        auto_class(config).from_config(config, dtype=dtype).save_pretrained(folder)


def make_batch(name: str, rows: int, num_tokens: int, num_labels: int) -> Batch:
    """Rows of random text, with an image first if the model reads images. The last tokens of each have labels."""
    model = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    if model.processor is None:
        vocab_size = model.config().vocab_size
        batch = {"input_ids": torch.randint(vocab_size, (rows, num_tokens), generator=generator)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    else:
        flags = StepConfig(max_seq_len=num_tokens)
        batch = full_rows(model.processor(), flags, Row(num_tokens, 1), rows)
        batch["input_ids"][:, -num_labels:] = torch.randint(NUM_BYTES, (rows, num_labels), generator=generator)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : num_tokens - num_labels] = IGNORE_INDEX
    return batch


def set_adapter(model: nn.Module) -> None:
    """Give all variants the same adapter. B is random too: zero, as LoRA begins, it would make half of the gradients
    zero."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for name, p in sorted(model.named_parameters()) if p.requires_grad and ".lora_" in name]
    with gathered(parameters, modifier_rank=0), torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * ADAPTER_SCALE)


@cache
def frozen_matrix_weights(name: str) -> int:
    """The weights of the language model's linear layers and of its head, which each token is multiplied by."""
    config = MODELS[name].config()
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    layers = {module for module in language_model(model).modules() if isinstance(module, nn.Linear)}
    return sum(layer.weight.numel() for layer in layers | {head_of(model)})


@cache
def num_parameters(name: str) -> int:
    config = MODELS[name].config()
    with torch.device("meta"):
        return auto_class(config).from_config(config).num_parameters()


class ParkedWeights:
    """A model's frozen weights, which leave the GPU while other variants run there. Memory stays reserved by nobody.

    They are kept in pinned host memory all the time: leaving is free, coming back takes 0.2 seconds for 5 GB.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {id(parameter) for parameter in trained_parameters(model)}
        self.weights = [(p, p.data.cpu().pin_memory()) for p in model.parameters() if id(p) not in trained]

    def leave(self) -> None:
        for parameter, host in self.weights:
            parameter.data = host
        torch.cuda.empty_cache()

    def come_back(self) -> None:
        for parameter, host in self.weights:
            parameter.data = host.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
