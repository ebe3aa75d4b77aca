"""The autocast of the forward pass, for code that runs it again: in a backward pass it is off."""

import torch


def autocast_now(device_type: str) -> tuple[str, torch.dtype, bool]:
    """The arguments of torch.autocast that keep it as it is."""
    return device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
