"""Save what was trained, under every strategy: a PEFT adapter, or after full fine-tuning the model."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin

from models.gather import gather_trained
from training.read_back import check_saved


def save_trained(accelerator: Accelerator, model: nn.Module, processor: ProcessorMixin, output_dir: Path) -> None:
    """Write the adapter or model, and the processor, to `output_dir`, and read it back. All processes call together.

    Raises:
        RuntimeError: what is in the folder is not what was trained.
    """
    state_dict = gather_trained(accelerator, model)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        unwrapped.save_pretrained(output_dir, state_dict=state_dict)
        processor.save_pretrained(output_dir)
        with accelerator.autocast():
            check_saved(unwrapped, output_dir)
    accelerator.wait_for_everyone()
