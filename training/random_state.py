"""The state of a process's random number generators: read, restored, and as JSON for a checkpoint."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The state of this process's random number generators. Costs no synchronisation on a GPU."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_state_to_json(state: dict[str, Any]) -> dict[str, Any]:
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    json_state = {"python": [version, list(internal), gauss], "numpy": [name, keys.tolist(), *rest]}
    return json_state | {key: bytes(state[key].tolist()).hex() for key in ("torch", "cuda") if key in state}


def rng_state_from_json(state: dict[str, Any]) -> dict[str, Any]:
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    result = {"python": (version, tuple(internal), gauss), "numpy": (name, np.array(keys, dtype=np.uint32), *rest)}
    for key in ("torch", "cuda"):
        if key in state:
            result[key] = torch.tensor(list(bytes.fromhex(state[key])), dtype=torch.uint8)
    return result
