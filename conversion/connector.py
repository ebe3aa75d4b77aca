"""The parts between towers and language model, projector and mining, with new weights."""

from pathlib import Path

import torch

from configuration_mgm import MGMConfig
from conversion.shards import Shard
from modeling_mgm import MGMForConditionalGeneration


CONNECTOR = ("multi_modal_projector", "patch_info_mining")
CONNECTOR_FILE, CONNECTOR_SEED = "projector_and_mining.safetensors", 0


def new_connector(config: MGMConfig, dtype: torch.dtype) -> Shard:
    """Projector and mining as the model itself initializes them."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONNECTOR_SEED)
        for name in CONNECTOR:
            model.model.get_submodule(name).to_empty(device="cpu").apply(model._init_weights)
    tensors = {name: x.to(dtype) for name, x in model.state_dict().items() if name.split(".")[1] in CONNECTOR}
    return Shard(Path(CONNECTOR_FILE), CONNECTOR_FILE, tensors, load=lambda: tensors)
