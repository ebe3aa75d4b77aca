"""Fine-tune a vision-language model with LoRA on a small GPU. The launch config chooses the strategy, flags the rest:

    accelerate launch --config_file accelerate_configs/zero3.yaml train.py
    accelerate launch --config_file accelerate_configs/zero3.yaml train.py --recipe recipes/mgm_2b_stage2.yaml

Without arguments it fine-tunes the embedded tiny model on the embedded demo, with the flags of recipes/demo.yaml. The
last line on stdout is a JSON object.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache
from transformers import ProcessorMixin, get_scheduler

from chat.image_text import has_fixed_images
from data.dataset import ConversationDataset, digest_records, open_dataset
from data.demo import ensure_demo
from data.images import MOVED
from data.lengths import column_values, count_cut, with_lengths
from data.loader import build_loader, sample_with_images
from data.sizes import with_image_sizes
from data.spot_check import check_lengths, learned_text
from data.turn_ends import missing_turn_end
from evaluation.held_out import HeldOut, evaluate
from models.loading import check_is_no_preset, load_processor, num_positions
from step import (
    build_accelerator,
    build_model,
    build_optimizer,
    check_model,
    fuses_optimizer,
    prepare,
    training_step,
)
from training.checkpoints import (
    Checkpoints,
    Position,
    check_output_dir,
    find_checkpoint,
    finished_run,
    run_settings,
)
from training.config import DEMO_RECIPE, TrainConfig
from training.disk_room import warn_of_little_room
from training.doctor import run_doctor
from training.doctor_machines import run_doctor_on_machines
from training.faults import BadSamples, NonFiniteUpdates, Watch, check_bad_fraction
from training.network import choose_interface, num_processes
from training.out_of_memory import ExplainOutOfMemory
from training.peers import Peers
from training.processes import check_same, main_processes_first, of_main
from training.rehearsal import rehearse
from training.run_log import RunLog
from training.saving import save_trained
from training.training_state import TrainingState
from utils import UserError, run_script


MAX_NAMED_RECORDS = 100  # of those left out; data.check names them all


def main(config: TrainConfig) -> dict | None:
    if config.doctor and num_processes() > 1:
        return run_doctor_on_machines(config)
    if config.doctor:
        return run_doctor(config)
    check_output_dir(config)
    choose_interface()
    accelerator = build_accelerator(
        config.mixed_precision,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.max_grad_norm,
        config.output_dir,
    )
    with Peers(accelerator):
        return train(config, accelerator)


def train(config: TrainConfig, accelerator: Accelerator) -> dict | None:
    """All of the run that several processes do together."""
    output_dir = Path(config.output_dir)
    check_model(config)
    processor = build_processor(config)
    set_seed(config.seed)

    # Bad data is found here, before the first byte is written.
    with main_processes_first(accelerator):
        train_dataset, eval_dataset = build_datasets(config, processor)
    data = train_dataset.digest
    check_same(accelerator, config.shared_flags | {"data": data})
    if finished := of_main(accelerator, lambda: finished_run(config, data)):
        accelerator.print(f"{output_dir} is finished already")
        return finished if accelerator.is_main_process else None
    if config.dataset is None:
        accelerator.print(f"No --dataset: training on the demo with recipes/{DEMO_RECIPE.name}")
    held_out = HeldOut.of(
        eval_dataset,
        processor,
        config.per_device_eval_batch_size,
        config.max_new_tokens,
        positions=num_positions(config.model),
        max_image_pixels=config.max_image_pixels,
    )

    model = build_model(
        config, accelerator.state.deepspeed_plugin is not None, accelerator.is_fsdp2, report=accelerator.print
    )
    loader, sampler, longest = build_loader(
        config, train_dataset, processor, accelerator.num_processes, config.group_by_length
    )
    if config.packing:
        accelerator.print(f"Packed {len(train_dataset)} samples into {len(loader.dataset)} rows")
    is_fused = fuses_optimizer(accelerator, config.optim)
    optimizer = build_optimizer(model, config.optim, config.learning_rate, config.weight_decay, is_fused)
    num_steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * sampler.num_updates()
    scheduler = build_scheduler(config, optimizer, num_steps)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)

    state = TrainingState(accelerator, model, optimizer, scheduler)
    settings = run_settings(
        config,
        data=data,
        lengths=sampler.digest(),
        samples_per_update=sampler.update_size,
        updates=num_steps,
        trained=state.shapes(),
    )
    checkpoint, position = of_main(
        accelerator,
        lambda: find_checkpoint(config.resume_from_checkpoint, output_dir, settings, accelerator.print),
    )
    updates = range(position.global_step + 1, num_steps + 1)
    warn_of_little_room(accelerator, config, model, state.shapes(), updates)

    with (
        Watch(accelerator) as watch,
        ExplainOutOfMemory(accelerator, config, longest) as out_of_memory,
        RunLog(accelerator, config, model, optimizer, num_steps, longest, position.global_step) as log,
        Checkpoints(accelerator, config, state, log, settings) as saver,
    ):
        log.num_cut_replies = train_dataset.num_cut
        model.train()
        if config.rehearse:
            rows = (longest, held_out.longest)
            sample = sample_with_images(config, train_dataset, processor)
            rehearse(accelerator, model, processor, state, config, *rows, sample, announce=out_of_memory.at)
        if checkpoint is None:
            out_of_memory.at(held_out.when, held_out.longest)
            log.evaluation(0, evaluate(accelerator, model, processor, held_out), eval_dataset)
        else:
            saver.resume(checkpoint)
        clear_device_cache()  # of loading and answering

        log.start()
        global_step = position.global_step
        sampler.start_at(position.epoch, position.update)
        nonfinite = NonFiniteUpdates(accelerator, config.max_nonfinite_updates)
        bad_samples = BadSamples(watch, log, train_dataset, config.max_bad_fraction)
        while global_step < num_steps:
            label_tokens = sampler.label_tokens_per_update()
            first_step = global_step - sampler.first_update
            for batch in watch.batches(loader):
                out_of_memory.at(f"in step {global_step + 1}")
                num_items_in_batch = bad_samples.count(batch, label_tokens[global_step - first_step])
                with accelerator.accumulate(model):
                    loss, grad_norm = training_step(
                        accelerator,
                        model,
                        optimizer,
                        scheduler,
                        batch.inputs,
                        num_items_in_batch=num_items_in_batch,
                        max_grad_norm=config.max_grad_norm,
                        skip_nonfinite=True,
                    )
                log.micro_batch(batch, loss)
                nonfinite.micro_batch(loss, batch.sample_ids)
                if accelerator.sync_gradients:
                    global_step += 1
                    loss_scale = state.loss_scale()
                    is_skipped = nonfinite.update(global_step, grad_norm, loss_scale)
                    learning_rate = scheduler.get_last_lr()[0]
                    log.update(global_step, num_items_in_batch, learning_rate, grad_norm, loss_scale, is_skipped)
                    saver.update(Position(global_step, sampler.epoch, global_step - first_step), is_skipped)
                if global_step == num_steps:
                    break
            sampler.start_at(sampler.epoch + 1)

        out_of_memory.at("while saving")
        save_trained(accelerator, model, processor, output_dir)
        clear_device_cache()  # of training
        with noting_what_is_saved(output_dir):
            out_of_memory.at(held_out.when, held_out.longest)
            log.evaluation(global_step, evaluate(accelerator, model, processor, held_out), eval_dataset)
        return log.finish(global_step, data)


@contextmanager
def noting_what_is_saved(output_dir: Path) -> Iterator[None]:
    """An error in this context also says that what was trained is not lost."""
    try:
        yield
    except Exception as error:
        error.add_note(f"What was trained is saved in {output_dir}")
        raise


def build_processor(config: TrainConfig) -> ProcessorMixin:
    """The model's processor, with `--image_aspect_ratio` if that is given. The run saves the processor with it.

    Raises:
        UserError: the flag is given, and the processor has no such setting.
    """
    check_is_no_preset(config.model)
    processor = load_processor(config.model)
    if hasattr(processor, "image_aspect_ratio"):
        if config.image_aspect_ratio is None:
            config.image_aspect_ratio = processor.image_aspect_ratio  # for run.json
        processor.image_aspect_ratio = config.image_aspect_ratio
    elif config.image_aspect_ratio is not None:
        raise UserError(
            f"--image_aspect_ratio {config.image_aspect_ratio}: {type(processor).__name__} has no such setting, "
            "leave it out"
        )
    return processor


def build_datasets(
    config: TrainConfig, processor: ProcessorMixin
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The samples to train on, and those to evaluate on, if any."""
    train_path, eval_path, image_folder = config.dataset, config.eval_dataset, config.image_folder
    if train_path is None:
        demo = ensure_demo()
        train_path, eval_path = demo / "train.json", eval_path or demo / "validation.json"

    skips_bad, follow_links = config.skips_bad_samples, config.follow_links
    train_dataset = open_dataset(train_path, image_folder, skips_bad, follow_links)
    report_left_out(train_dataset, config.max_bad_fraction)
    if train_dataset.num_moved:
        PartialState().print(f"{train_dataset.num_moved:,} {MOVED}")
    check_turn_ends(config, processor, train_dataset)
    records = with_lengths(train_dataset, processor, config.max_seq_len, config.max_image_pixels)
    fitting = np.flatnonzero(column_values(records, "num_label_tokens"))
    if len(fitting) == 0:
        raise UserError(f"--max_seq_len {config.max_seq_len}: no sample of {train_path} fits, choose a larger one")
    if len(fitting) < len(records):
        num_dropped = len(records) - len(fitting)
        PartialState().print(f"Left out {num_dropped} of {len(records)} samples: longer than {config.max_seq_len}")
    train_dataset.num_cut = count_cut(records, config.max_seq_len)
    if train_dataset.num_cut:
        cut = f"Cut {train_dataset.num_cut} of {len(records)} samples at --max_seq_len {config.max_seq_len}"
        PartialState().print(f"{cut}: the end of their replies, with the end of turn, is not learned")
    train_dataset.digest = digest_records(records)
    train_dataset.records = records.select(fitting)
    PartialState().print(*learned_text(processor, train_dataset), sep="\n")
    check_lengths(processor, train_dataset, config.max_image_pixels)

    if eval_path is None or config.eval_samples == 0:
        return train_dataset, None
    eval_dataset = open_dataset(eval_path, image_folder, follow_links=follow_links)
    eval_dataset.records = eval_dataset.records.shuffle(seed=0).select(
        range(min(config.eval_samples, len(eval_dataset)))
    )
    if not has_fixed_images(processor):
        eval_dataset.records = with_image_sizes(eval_dataset)
    return train_dataset, eval_dataset


def check_turn_ends(config: TrainConfig, processor: ProcessorMixin, dataset: ConversationDataset) -> None:
    """Raise UserError if the model would not learn to end its turn; only warn if the flag allows it."""
    records = (dataset.records[index] for index in (0, len(dataset) - 1))
    problem = next(filter(None, (missing_turn_end(config.model, processor, record) for record in records)), None)
    if problem and not config.allow_missing_end_of_turn:
        raise UserError(f"{problem}. Mend the template, or give --allow_missing_end_of_turn")
    if problem:
        PartialState().print(f"warning: {problem}", file=sys.stderr)


def report_left_out(dataset: ConversationDataset, max_bad_fraction: float) -> None:
    """Print the records that are skipped. Raises UserError if they are too many."""
    problems = list(dataset.problems.values())
    for problem in problems[:MAX_NAMED_RECORDS]:
        PartialState().print(f"warning: left out: {problem}", file=sys.stderr)
    if len(problems) > MAX_NAMED_RECORDS:
        PartialState().print(f"warning: left out: {len(problems) - MAX_NAMED_RECORDS} more", file=sys.stderr)
    check_bad_fraction(len(problems), len(dataset) + len(problems), max_bad_fraction)


def build_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    # At least one step after the warm-up: polynomial divides by their number.
    num_warmup_steps = min(round(config.warmup_ratio * num_steps), num_steps - 1)
    return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)


if __name__ == "__main__":
    run_script(main, TrainConfig, exit_code=lambda result: 2 if result["status"] == "problem" else 0)
