"""After saving: read the folder back with PEFT's or transformers' own loader, and compare it with the model in memory.

A folder that lacks a tensor, or holds one under a name that PEFT does not know, loads without an error, and answers as
if it had not been trained.
"""

from pathlib import Path

import psutil
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn

from models.gather import is_partitioned
from models.loading import load_model
from utils import size


READ_BACK = "read_back"  # the name of a second adapter in the model
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]  # token ids that every vocabulary has
TOLERANCE = 1e-5  # of the largest logit: the same kernels compute both


def check_saved(model: nn.Module, folder: Path) -> None:
    """Compare what `folder` holds with the model that was saved there. The main process calls.

    Of an adapter the logits of a short text are compared, of a fully trained model each tensor. Nothing is where
    ZeRO-3 or FSDP2 holds the weights in parts, or biases are trained: the next evaluation shows it.

    Raises:
        RuntimeError: the folder does not give back what was trained.
    """
    if is_partitioned(model.parameters()):
        return
    if not isinstance(model, PeftModel):
        check_tensors(model, folder)
    elif model.active_peft_config.bias == "none":  # PEFT holds two adapters beside each other only without biases
        check_logits(model, folder)


def check_logits(model: PeftModel, folder: Path) -> None:
    """Load the folder's adapter beside the trained one, and compare the logits of a short text."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = last_logits(model)
    is_fp32 = any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    # DeepSpeed trains in the dtype of the compute; PEFT would load that as fp32, which rounds otherwise.
    model.load_adapter(str(folder), READ_BACK, torch_device=str(model.device), autocast_adapter_dtype=is_fp32)
    # Of modules that are trained in full PEFT makes copies in the dtype of the frozen ones.
    copies = (parameter for name, parameter in model.named_parameters() if READ_BACK in name.split("."))
    if is_fp32 and (narrow := [copy for copy in copies if copy.dtype != torch.float32]):
        for copy in narrow:
            copy.data = copy.data.float()
        weights = load_peft_weights(str(folder), device=str(model.device))
        set_peft_model_state_dict(model, weights, adapter_name=READ_BACK)
    model.set_adapter(READ_BACK)
    saved = last_logits(model)
    model.set_adapter("default")
    model.delete_adapter(READ_BACK)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    difference = float((trained - saved).abs().max() / trained.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{folder}: read back, the adapter gives logits that differ by {difference:.2%} from those of the trained "
            "model: it does not hold all that was trained"
        )


@torch.no_grad()
def last_logits(model: nn.Module) -> torch.Tensor:
    """The logits after PROMPT [vocabulary], in fp32."""
    was_training = model.training
    model.eval()
    prompt = torch.tensor([PROMPT], device=model.device)
    logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
    model.train(was_training)
    return logits[0, -1].float()


def check_tensors(model: nn.Module, folder: Path) -> None:
    """Load the folder's model into host memory, and compare each of its tensors with the one that was trained."""
    expected = model.state_dict()
    needed_bytes = 4 * sum(tensor.numel() for tensor in expected.values())
    if needed_bytes > psutil.virtual_memory().available:
        print(f"{folder} is not read back: host memory has no room for a second model ({size(needed_bytes)})")
        return
    for name, tensor in load_model(str(folder), torch.float32, "sdpa").state_dict().items():
        if name not in expected or not torch.equal(tensor, expected[name].to("cpu", tensor.dtype)):
            raise RuntimeError(f"{folder}: read back, {name} is not what was trained")
