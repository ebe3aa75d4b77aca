"""Records of a tiny run under each strategy, which several files of tests share."""

import functools

import torch

from memory.config import ProbeConfig
from memory.placed import PlacedRecord
from memory.predict import trace_strategy
from memory.strategy import Strategy
from step import build_model


def tiny_config(**flags: object) -> ProbeConfig:
    defaults = {"model": "tiny", "mixed_precision": "no", "max_seq_len": 48, "lora_r": 8}
    return ProbeConfig(mode="predict", **(defaults | flags))


def small_buckets(strategy: Strategy) -> Strategy:
    """The strategy with sizes that suit the tiny model: its weights are gathered and its buckets do not cover all."""
    if not strategy.name.startswith("zero"):
        return strategy
    strategy.deepspeed_config["zero_optimization"] |= {
        "reduce_bucket_size": 50_000,
        "allgather_bucket_size": 50_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_max_live_parameters": 200_000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_param_persistence_threshold": 1_000,
        "sub_group_size": 100_000,
    }
    return strategy


@functools.cache
def traced(name: str, offload: str = "none", world_size: int = 1, lora_r: int = 8) -> PlacedRecord:
    """The records of a tiny run on GPUs. Tests only read it, so that they can share it."""
    strategy = small_buckets(Strategy.from_flags(name, offload, world_size))
    return trace_strategy(tiny_config(lora_r=lora_r), strategy)


def parameter_bytes(lora_r: int = 8) -> dict[bool, int]:
    """Bytes of the tiny model's trained (True) and frozen (False) parameters in fp32."""
    with torch.device("meta"):
        model = build_model(tiny_config(lora_r=lora_r), is_deepspeed=True)
    sums = {True: 0, False: 0}
    for parameter in model.parameters():
        sums[parameter.requires_grad] += parameter.numel() * 4
    return sums
