"""Save what was trained, under every strategy: a PEFT adapter, or the whole model after full fine-tuning."""

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin


def save_trained(accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, output_dir: Path) -> None:
    """Write an adapter or a model, and the processor, to `output_dir`."""
    unwrapped = accelerator.unwrap_model(model)
    if isinstance(unwrapped, PeftModel):
        state_dict = gather_trained(unwrapped)
    else:
        state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unwrapped.save_pretrained(output_dir, state_dict=state_dict)
        processor.save_pretrained(output_dir)
    accelerator.wait_for_everyone()


def gather_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, on the CPU. ZeRO-3 splits them among processes; the rest stays put."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _gathered(list(trained.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def _gathered(parameters: list[nn.Parameter]):
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
