"""Save what was trained, under every strategy: a PEFT adapter, or the whole model after full fine-tuning."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin


def save_trained(accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, output_dir: Path) -> None:
    """Write an adapter or a model, and the processor, to `output_dir`. Every process has to call it."""
    unwrapped = accelerator.unwrap_model(model)
    state_dict = None
    if isinstance(unwrapped, PeftModel):
        state_dict = gather_trained(accelerator, unwrapped)
    elif is_partitioned(unwrapped.parameters()):
        state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unwrapped.save_pretrained(output_dir, state_dict=state_dict)
        processor.save_pretrained(output_dir)
    accelerator.wait_for_everyone()


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that PEFT saves by name, on the main process's CPU. The frozen rest stays where it is."""
    saved = {name: p for name, p in model.named_parameters() if p.requires_grad or ".modules_to_save." in name}
    with gathered(list(saved.values())):
        if not accelerator.is_main_process:
            return {}
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in saved.items()}


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 has split the parameters among the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which the parameters are whole. What the process `modifier_rank` makes of them, all get."""
    if not is_partitioned(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
