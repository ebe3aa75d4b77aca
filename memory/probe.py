"""One configuration's memory: predicted, measured, or both.

    python -m memory.probe --recipe FLAGS.yaml

A run starts this command beside itself. The last line on stdout is the result as JSON.
"""

import time
from dataclasses import asdict

from memory.config import ProbeConfig
from memory.disk import checkpoint_bytes
from memory.explain import suggest
from memory.measure import measure
from memory.placed import PlacedRecord
from memory.predict import last_rank, summarize, trace_step
from memory.trace import trained_shapes
from step import check_model
from utils import run_script


def probe(config: ProbeConfig) -> dict:
    """What memory_probe.py reports of one configuration: the last line that it prints."""
    return probe_with_record(config)[0]


def probe_with_record(config: ProbeConfig) -> tuple[dict, PlacedRecord | None]:
    """What probe returns, and the record of the step from which the prediction comes; None: nothing was predicted."""
    start = time.monotonic()
    check_model(config)
    result, record = {"mode": config.mode, "model": config.model, "config": asdict(config)}, None
    if config.mode != "measure":
        record = trace_step(config)
        result |= summarize(record, config)
        if config.world_size > 1:
            result["last_rank"] = last_rank(record, config)
    if config.mode != "predict":
        measured = measure(config)
        if config.mode == "both":
            result |= compare(result["peak_allocated_bytes"], measured["peak_allocated_bytes"])
            measured = {"measured": measured}
        result |= measured
    result["checkpoint_bytes"] = predicted_checkpoint_bytes(config)
    result["budget_bytes"] = config.budget_bytes
    device_bytes = max(result["device_bytes"], result.get("last_rank", result)["device_bytes"])
    result["fits"] = device_bytes <= config.budget_bytes and result.get("oom") is None
    return result | {"seconds": time.monotonic() - start}, record


def predicted_checkpoint_bytes(config: ProbeConfig) -> int:
    """Bytes of a checkpoint on the disk."""
    return checkpoint_bytes(trained_shapes(config), config.optim, config.world_size)


def compare(predicted_bytes: int, measured_bytes: int) -> dict[str, float]:
    return {
        "predicted_peak_allocated_bytes": predicted_bytes,
        "measured_peak_allocated_bytes": measured_bytes,
        "error": predicted_bytes / measured_bytes - 1,
    }


def main(config: ProbeConfig) -> dict:
    """What training/forecast.py asks for: the prediction, with --explain also what to change."""
    result = probe(config)
    return result | (suggest(config, result["device_bytes"]) if config.explain else {})


if __name__ == "__main__":
    run_script(main, ProbeConfig)
