"""Save what was trained, under every strategy: a PEFT adapter, or the whole model after full fine-tuning."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin

from models.gather import gather_trained


def save_trained(accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, output_dir: Path) -> None:
    """Write an adapter or a model, and the processor, to `output_dir`. Every process has to call it."""
    state_dict = gather_trained(accelerator, model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=state_dict)
        processor.save_pretrained(output_dir)
    accelerator.wait_for_everyone()
