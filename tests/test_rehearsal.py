"""The rehearsal of the largest step leaves no trace, and what runs out of memory is explained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forked_runs import Fault, run
from safetensors.torch import load_file
from transformers import get_scheduler

from data.worst_case import Row, worst_case_batch
from memory.probed_step import local_accelerator
from models.loading import load_processor
from step import StepConfig, build_model, build_optimizer
from training import rehearsal
from training.out_of_memory import asked_for, is_out_of_memory, remedy
from training.rehearsal import rehearse
from training.training_state import TrainingState


FLAGS = "--max_steps 3 --save_steps 3 --logging_steps 1 --eval_samples 0 --dataloader_num_workers 0"
FLAGS += " --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --dataset data/demo/validation.json"
FORWARD = "mgm.modeling_mgm.MGMForConditionalGeneration.forward"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "num_processes"),
    [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 1), ("zero3", 1), ("zero2", 2), ("zero3", 2)],
)
def test_leaves_no_trace(config: str, num_processes: int, tmp_path: Path) -> None:
    """Weights, optimizer and random numbers: the run with it ends bitwise where the run without it ends."""
    flags = f"{FLAGS} --weight_decay 0.1 --output_dir"
    for name, flag in (("with", ""), ("without", " --no_rehearse")):
        ended = run(f"{flags} {tmp_path / name}{flag}", tmp_path / "logs", config, num_processes)
        assert ended.code == 0, ended.err[-3000:]
    states = [load_file(tmp_path / name / "checkpoint-3/trained-00001.safetensors") for name in ("with", "without")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert adapters[0] == adapters[1]


@pytest.fixture
def prepared() -> Iterator[tuple[Accelerator, torch.nn.Module, TrainingState, StepConfig]]:
    """What a rehearsal is given, in one process."""
    config = StepConfig(model="tiny", lora_r=4, max_seq_len=60, gradient_accumulation_steps=4)
    with local_accelerator(config) as accelerator:
        model = build_model(config, is_deepspeed=False).train()
        optimizer = build_optimizer(model, config.optim, learning_rate=1e-3, weight_decay=0.1)
        scheduler = get_scheduler("constant", optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        yield accelerator, model, TrainingState(accelerator, model, optimizer, scheduler), config


def test_gradients_and_moments_are_in_place(prepared: tuple) -> None:
    """Two of four micro-batches run, the second one with all that a later update has; then all is as it was."""
    accelerator, model, state, config = prepared
    parameters = state.parameters.values()
    before, random_numbers = [p.detach().clone() for p in parameters], torch.get_rng_state()
    found = []
    model.register_forward_pre_hook(
        lambda *_: found.append((sum(p.grad is not None for p in parameters), len(state.optimizer.state)))
    )
    processor = load_processor("tiny")
    sample = worst_case_batch(processor, config, Row(60, 1))
    sample["input_ids"][0, -20:] = torch.arange(20)
    sample["pixel_values"] += torch.linspace(-1, 1, sample["pixel_values"].shape[-1])
    rehearse(accelerator, model, processor, state, config, Row(60, 1), None, sample, announce=lambda *_: None)
    assert found == [(0, len(before)), (len(before), len(before)), (0, len(before))]
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))
    assert not any(value.any() for values in state.optimizer.state.values() for value in values.values())
    assert [group["lr"] for group in state.optimizer.param_groups] == [1e-3]
    assert torch.equal(torch.get_rng_state(), random_numbers)


@pytest.mark.parametrize("value", [1e-6, float("nan")])
def test_a_trace_is_an_error(value: float, prepared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of DeepSpeed whose step changes what is trained must not go unnoticed."""
    accelerator, model, state, config = prepared

    def changing_step(*_: object, **__: object) -> None:
        next(iter(state.parameters.values())).data.view(-1)[0] += value

    monkeypatch.setattr(rehearsal, "run_step", changing_step)
    with pytest.raises(RuntimeError, match="--no_rehearse leaves it out"):
        rehearse(accelerator, model, load_processor("tiny"), state, config, Row(60, 1), None, None, lambda *_: None)


@pytest.mark.slow
def test_out_of_memory_for_real(tmp_path: Path) -> None:
    """The process may have 256 MiB more than it has before the rehearsal, and the rehearsal needs more: explained in
    one line, with the prediction above it, and nothing is left of the run."""
    fault = Fault("training.rehearsal.worst_case_batch", 1, "little memory")
    flags = FLAGS.replace("batch_size 4", "batch_size 512")
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path, faults=(fault,))
    assert ended.code == 2 and "out of memory before step 1" in ended.error and "of host memory" in ended.error
    assert "Predicted were" in ended.error and "limits on it" in ended.error, "the machine has enough"
    smaller = "--per_device_train_batch_size 256 --gradient_accumulation_steps 4: "
    for words in ("Predicted: ", "At the peak:", "frozen weights", "What to change:", smaller):
        assert words in ended.err, words
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_out_of_memory_later(tmp_path: Path) -> None:
    """Injected, as a GPU's allocator would say it, in step 2, with no place for a prediction either: the checkpoint
    before it is intact."""
    faults = Fault("train.training_step", 4, "out of memory"), Fault("training.out_of_memory.Forecast", 1, "disk full")
    flags = FLAGS.replace("save_steps 3", "save_steps 1")
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path, faults=faults)
    assert ended.code == 2
    assert "out of memory in step 2: Tried to allocate 500.00 MiB" in ended.error
    assert "There is no prediction (No space left on device)" in ended.error
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert run(f"{flags} --output_dir {tmp_path / 'out'} --resume_from_checkpoint latest", tmp_path).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("action", "words"), [("out of memory", "Tried to allocate"), ("bad sample", "7.png cannot")])
def test_the_last_evaluation_fails(action: str, words: str, tmp_path: Path) -> None:
    """What was trained is saved before it, and the error says where. The run can be ended later."""
    faults = (
        Fault("evaluation.held_out.answer_batches", 2, action),
        Fault("training.out_of_memory.Forecast", 1, "disk full"),
    )
    held_out = "eval_samples 8 --per_device_eval_batch_size 4 --eval_dataset data/demo/validation.json"
    flags = f"{FLAGS.replace('eval_samples 0', held_out)} --output_dir {tmp_path / 'out'}"
    ended = run(flags, tmp_path, faults=faults)
    assert ended.code == 2 and words in ended.error
    assert f"What was trained is saved in {tmp_path / 'out'}" in ended.error
    if action == "out of memory":
        assert "while answering held-out questions, 4 at a time (--per_device_eval_batch_size)" in ended.error
    assert load_file(tmp_path / "out/adapter_model.safetensors")
    ended = run(f"{flags} --resume_from_checkpoint latest", tmp_path)
    assert ended.code == 0 and ended.result["eval"]["n"] == 8 and ended.result["status"] == "done"


@pytest.mark.slow
def test_stopped_in_the_last_evaluation(tmp_path: Path) -> None:
    """All steps are done, so a signal need not wait for them: it ends the answering at once."""
    held_out = "eval_samples 8 --eval_dataset data/demo/validation.json"
    flags = f"{FLAGS.replace('eval_samples 0', held_out)} --output_dir {tmp_path / 'out'}"
    ended = run(flags, tmp_path, faults=(Fault("train.evaluate", 2, "terminate"),))
    assert ended.code == 143 and "Kept step" in ended.out, ended.err[-2000:]
    assert load_file(tmp_path / "out/adapter_model.safetensors") and not (tmp_path / "out/run.json").exists()


@pytest.mark.slow
def test_answering_is_rehearsed(tmp_path: Path) -> None:
    """Before step 1, in the largest batch of questions: memory that they lack is missed then."""
    fault = (
        Fault("models.generation.generate_tokens", 1, "out of memory"),
        Fault("training.out_of_memory.Forecast", 1, "disk full"),
    )
    flags = FLAGS.replace("eval_samples 0", "eval_samples 8 --eval_dataset data/demo/validation.json")
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path, faults=fault)
    assert ended.code == 2 and "before step 1, in the largest batch of held-out questions" in ended.error
    assert not (tmp_path / "out").exists()


def test_messages() -> None:
    """What PyTorch's allocators say, and each end of the remedy."""
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 500.00 MiB. GPU 0 has a total capacity of 23.63 GiB of which 301.00 "
        "MiB is free. Including non-PyTorch memory, this process has 22.66 GiB memory in use. Of the allocated ..."
    )
    assert is_out_of_memory(gpu)
    assert asked_for(gpu) == "Tried to allocate 500.00 MiB, this process has 22.66 GiB memory in use"
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(cpu.value) and "of host memory" in asked_for(cpu.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    fits = {"device_bytes": 2**30, "budget_bytes": 2**31, "fits": True, "nearest": None}
    assert "look for other programs" in remedy(fits, None)
    nearest = {"flags": {"max_seq_len": 1024, "config_file": None}, "device_bytes": 2**30}
    assert (
        remedy(fits | {"fits": False, "nearest": nearest}, None) == "Nearest that fits: --max_seq_len 1024 (1.00 GiB)"
    )
    assert "a smaller model" in remedy(fits | {"fits": False}, None)
    assert "it failed" in remedy(None, "it failed")
