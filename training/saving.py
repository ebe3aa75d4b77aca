"""Save what was trained, under every strategy: a PEFT adapter, or after full fine-tuning the model."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin

from models.gather import gather_trained


def save_trained(accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, output_dir: Path) -> None:
    """Write the adapter or model, and the processor, to `output_dir`. All processes call together."""
    state_dict = gather_trained(accelerator, model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=state_dict)
        processor.save_pretrained(output_dir)
    accelerator.wait_for_everyone()
